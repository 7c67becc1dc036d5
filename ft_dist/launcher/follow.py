"""Show the console of a run that goes on without us, until it ends or the user has seen enough."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ft_dist.launcher.record import JobState

STATE_EVERY_S = 3.0
READ_EVERY_S = 0.2
LAST_WORDS_S = 2.0
"""A shared file system shows a node's last lines a little late"""


def follow(
    log: Path, *, start: int, ask_state: Callable[[], JobState], say: Callable[[str], None], show: Callable[[str], None]
) -> JobState:
    """Show `log` from byte `start` on, and `say` each new state of the job; returns the state it ended in.

    KeyboardInterrupt passes through: the run goes on.
    """
    position, told, asked_at, state = start, "", -STATE_EVERY_S, JobState("unknown")
    while True:
        if time.monotonic() - asked_at >= STATE_EVERY_S:
            state, asked_at = ask_state(), time.monotonic()
            words = f"{state.state}: {state.detail}" if state.detail else state.state
            if words != told:
                say(words)
                told = words
        position = _show(log, position, show)
        if not state.active:
            time.sleep(LAST_WORDS_S)
            _show(log, position, show)
            return state
        time.sleep(READ_EVERY_S)


def _show(log: Path, position: int, show: Callable[[str], None]) -> int:
    for text in _new(log, position):
        show(text.decode(errors="replace"))
        position += len(text)
    return position


def _new(log: Path, position: int) -> Iterator[bytes]:
    try:
        with log.open("rb") as file:
            file.seek(position)
            while text := file.read(65536):
                yield text
    except OSError:
        # the job has not started
        return
