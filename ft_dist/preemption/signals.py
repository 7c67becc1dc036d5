"""SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 ask the run to stop, even while its main thread is blocked.

A Python handler runs only between two bytecodes of the main thread, and that thread may block in a collective or a read
for minutes. The interpreter's C handler writes the number into a pipe (`signal.set_wakeup_fd`), where a thread
reads it.

SIGHUP comes when a terminal closes. A process that was started to ignore it (`nohup`) keeps ignoring it.
"""

import contextlib
import os
import signal
import threading
from types import FrameType

from ft_dist.preemption.stop import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def heeded() -> list[signal.Signals]:
    """`SIGNALS`, without SIGHUP if this process ignores it."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not ignores_hangup]


def listen(stop: StopRequest) -> None:
    """Pass the signals that are `heeded` to `stop` from now on. Main thread only."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in heeded():
        signal.signal(number, _read_elsewhere)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_pass_on, args=(reader, stop), name="signals", daemon=True).start()


def ignore() -> None:
    """Once the run has finished, so that it exits with 0. Main thread only.

    While the interpreter shuts down, it would restore the default action of every signal that has a Python handler.
    """
    for number in heeded():
        signal.signal(number, signal.SIG_IGN)


def _pass_on(reader: int, stop: StopRequest) -> None:
    while True:
        for number in os.read(reader, 64):
            if number in SIGNALS:
                stop.signalled(number)


def _read_elsewhere(number: int, frame: FrameType | None) -> None:
    """The thread reads the number; this handler only prevents the default action."""


def _forget() -> None:
    """A forked child (a pool of tokenising processes) shares the pipe: stopping the child must not stop the run."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
        for number in heeded():
            signal.signal(number, signal.SIG_DFL)
