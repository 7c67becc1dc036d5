"""SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask the run to finish its step, commit and exit 75; a second one leaves at once.

A handler only sets a flag: the ranks agree on the step to stop at through the loss's own reduction.
"""

import os
import signal
from types import FrameType

from ft_dist.errors import EXIT_PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """`requested` becomes True with the first signal; `reason` names it."""

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""
        self._training = False
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def training_started(self) -> None:
        """From here on a signal waits for a commit; before it there is nothing to save and it ends the process."""
        self._training = True

    def training_ended(self) -> None:
        """Every step is committed: a signal need not wait for the evaluation that follows."""
        self._training = False
        if self.requested:
            os._exit(EXIT_PREEMPTED)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self._training:
            # os._exit: no clean-up may wait here for a rank that is already gone; the last commit is on disk
            os._exit(EXIT_PREEMPTED)
        self.requested = True
        self.reason = signal.Signals(number).name
