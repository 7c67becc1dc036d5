"""What agents and head say to each other, with the bounds of every value: members are checked as well."""

import signal
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ft_dist.launcher.machine import FORWARDED
from ft_dist.outside import Document

MOST_RANKS_PER_NODE = 1024
MOST_RANKS = 2**24
LONGEST_TEXT = 2000

Count = Annotated[int, Field(ge=0, le=MOST_RANKS)]
Round = Annotated[int, Field(ge=1, le=2**31)]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must not hold control characters")
    return text


def _forwarded(number: int) -> int:
    if number not in FORWARDED:
        raise ValueError("must be a signal that agents forward")
    return number


Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT), AfterValidator(_printable)]


class Hello(Document):
    """An agent names the run for which it was started, and its node."""

    type: Literal["hello"] = "hello"
    protocol: int
    run_id: str
    code: str
    config: str
    node: Annotated[Text, Field(max_length=255)]
    nproc: Annotated[int, Field(ge=1, le=MOST_RANKS_PER_NODE)]
    agent: Annotated[Text, Field(max_length=64)]


class Ended(Document):
    """A worker has ended. `code` is negative for a signal, None if the agent killed it."""

    type: Literal["ended"] = "ended"
    round: Round
    rank: Count
    code: Annotated[int, Field(ge=-signal.NSIG, le=255)] | None


class Leaving(Document):
    """The agent was sent a signal."""

    type: Literal["leaving"] = "leaving"
    number: Annotated[int, AfterValidator(_forwarded)]


class Welcome(Document):
    type: Literal["welcome"] = "welcome"


class Refused(Document):
    type: Literal["refused"] = "refused"
    why: str


class ShareOfRound(Document):
    """`workers.Share` as it is sent."""

    round: Round
    first_rank: Count
    nproc: Annotated[int, Field(ge=1, le=MOST_RANKS_PER_NODE)]
    world_size: Count
    node_rank: Count
    nodes: Count
    master_addr: Annotated[Text, Field(max_length=255)]
    master_port: Annotated[int, Field(ge=1, le=65535)]


class Start(Document):
    type: Literal["start"] = "start"
    share: ShareOfRound


class Signal(Document):
    type: Literal["signal"] = "signal"
    round: Round
    number: Annotated[int, Field(ge=1, lt=signal.NSIG)]


class Stop(Document):
    type: Literal["stop"] = "stop"
    round: Round


class Over(Document):
    type: Literal["over"] = "over"
    code: Annotated[int, Field(ge=0, le=255)]
    why: str = ""


Schemas = Mapping[str, type[Document]]


def schemas(*kinds: type[Document]) -> Schemas:
    """By the value of `type`."""
    return {kind.model_fields["type"].default: kind for kind in kinds}


FROM_NODES: Schemas = schemas(Hello, Ended, Leaving)
FROM_HEAD: Schemas = schemas(Welcome, Refused, Start, Signal, Stop, Over)
