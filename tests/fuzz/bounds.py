"""What every input must do: succeed or raise one UserError of one line, within bounded time and memory."""

import resource
import signal
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from ft_dist.errors import UserError

SECONDS = 20
"""Far above what any input needs on a busy machine: more is a hang"""
MEMORY_BYTES = 1 << 30
"""How far one input may raise the peak memory of the process"""
LINE_CHARACTERS = 2_000

Result = TypeVar("Result")


def outcome(call: Callable[[], Result]) -> Result | UserError:
    """What `call` returns, or its UserError. Fails the test for any other exception, a hang or a peak of memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(SECONDS)
    found: Result | UserError
    try:
        found = call()
    except UserError as error:
        line = str(error)
        assert line.strip(), "an empty message"
        assert "\n" not in line, line
        assert len(line) < LINE_CHARACTERS, line
        found = error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY_BYTES, f"peak memory grew by {grown / 1e9:.1f} GB"
    return found


def _hangs(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"no end after {SECONDS} s")
