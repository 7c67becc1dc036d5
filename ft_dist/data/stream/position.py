"""The position of a stream as a commit saves it."""

from typing import Annotated, Any

from pydantic import Field

from ft_dist.errors import CheckpointError
from ft_dist.outside import Document, validated

Count = Annotated[int, Field(ge=0, le=2**53)]


class Counters(Document):
    """Of every stream."""

    epoch: Count
    window: Count
    row: Count
    epoch_samples: Count
    samples_seen: Count
    batches: Count


class Retired(Document):
    """A source that has left the mixture."""

    name: str
    fingerprint: str
    drawn: Count


class Source(Retired):
    taken: Count
    draws: Count


class MixturePosition(Counters):
    first_epoch: Count
    first_batch: Count
    sources: list[Source]
    retired: list[Retired]


class LivePosition(Counters):
    record: Count
    first_id: Count
    reader: dict[str, Any] | None


def check_position(state: dict[str, Any], schema: type[Counters]) -> None:
    """Raises CheckpointError, which names the first key of `state` that is missing or wrong."""
    validated(state, schema, where="state.json of the checkpoint: data", error=CheckpointError)
