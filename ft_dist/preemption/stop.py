"""The flag that every notice sets: finish the step, commit, exit 75.

Signals, cloud notices and the time limit set it from their threads; the training loop reads `wanted`, and the ranks
agree on the step through the reduction of the loss. While there is nothing to save (before the first step, and once the
last step is committed) a request ends the process immediately, also with 75: a restart repeats the missing work.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

from ft_dist.errors import EXIT_PREEMPTED
from ft_dist.observe.streams import unblocking
from ft_dist.preemption.slurm import TimeLimit

SAME_NOTICE_S = 1.0
"""Signals closer together are one notice: a scheduler signals every process, and the launcher forwards its signal"""


class StopRequest:
    """`wanted` becomes True with the first request and stays True; `reason` names that request."""

    def __init__(self) -> None:
        self.reason = ""
        self.time_limit: TimeLimit | None = None
        self.notify_others: Callable[[], None] | None = None
        """Called once, on its own thread, on the rank that was asked to stop"""
        self._asked_at: float | None = None
        self._signalled_at: float | None = None
        self._training = False
        self._lock = threading.Lock()

    @property
    def wanted(self) -> bool:
        if self._asked_at is None and self.time_limit and self.time_limit.is_near():
            self.ask("the job's time limit")
        return self._asked_at is not None

    @property
    def wanted_for_s(self) -> float:
        """Seconds since the first request, 0 without one."""
        return 0.0 if self._asked_at is None else time.monotonic() - self._asked_at

    def training_started(self) -> None:
        """From now on, a request waits for a commit."""
        self._training = True

    def training_ended(self) -> None:
        """Every step is committed, so a request no longer waits for anything."""
        self._training = False
        if self._asked_at is not None:
            leave(self.reason)

    def ask(self, reason: str) -> None:
        """Ask for a commit and the end of this process; later requests change nothing."""
        with self._lock:
            if self._asked_at is not None:
                return
            self.reason = reason
            self._asked_at = time.monotonic()
        if not self._training:
            leave(reason)
        if self.notify_others:
            threading.Thread(target=self.notify_others, name="notify-others", daemon=True).start()

    def signalled(self, number: int) -> None:
        """The first signal asks to stop; another one `SAME_NOTICE_S` or more later ends the process immediately."""
        name = signal.Signals(number).name
        now = time.monotonic()
        if self._signalled_at is not None and now - self._signalled_at >= SAME_NOTICE_S:
            leave(f"a second signal ({name})")
        if self._signalled_at is None:
            self._signalled_at = now
            self.ask(name)


def leave(reason: str) -> None:
    """Exit with 75 without clean-up, which might wait for a rank that is gone; the last commit is on disk."""
    try:
        if int(os.environ.get("RANK", 0)) == 0:
            os.write(unblocking(2), f"ft-dist: {reason}: exiting immediately\n".encode())
    finally:
        os._exit(EXIT_PREEMPTED)
