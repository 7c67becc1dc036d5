"""Show the console of a background run until the run ends or the user interrupts."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ft_dist.launcher.record import JobState

STATE_INTERVAL_S = 3.0
READ_INTERVAL_S = 0.2
FILE_SYSTEM_DELAY_S = 2.0
"""A shared file system shows a node's last lines a little late"""


def follow(
    log: Path,
    *,
    start: int,
    poll_state: Callable[[], JobState],
    say: Callable[[str], None],
    show: Callable[[str], None],
) -> JobState:
    """Show `log` from byte `start`, and `say` each new state of the job; returns the state in which it ended.

    Passes KeyboardInterrupt through, which does not end the run.
    """
    position, last_line, polled_at, state = start, "", -STATE_INTERVAL_S, JobState("unknown")
    while True:
        if time.monotonic() - polled_at >= STATE_INTERVAL_S:
            state, polled_at = poll_state(), time.monotonic()
            line = f"{state.state}: {state.detail}" if state.detail else state.state
            if line != last_line:
                say(line)
                last_line = line
        position = _show(log, position, show)
        if not state.active:
            time.sleep(FILE_SYSTEM_DELAY_S)
            _show(log, position, show)
            return state
        time.sleep(READ_INTERVAL_S)


def _show(log: Path, position: int, show: Callable[[str], None]) -> int:
    for text in _read_from(log, position):
        show(text.decode(errors="replace"))
        position += len(text)
    return position


def _read_from(log: Path, position: int) -> Iterator[bytes]:
    try:
        with log.open("rb") as file:
            file.seek(position)
            while text := file.read(65536):
                yield text
    except OSError:
        # the job has not started
        return
