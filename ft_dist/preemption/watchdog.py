"""Detects a rank that makes no progress, writes its stacks and ends it.

The loop beats after every micro-batch, evaluated batch, generated token and commit. A rank without a beat for
`timeout_s` hangs or waits for a rank that hangs: its threads' stacks go to logs/rank-N-stacks.log and it exits 76. The
launcher then makes the remaining ranks write theirs, even one that is stopped or holds the interpreter's lock.

After a stop request the limit is shorter, since the machine goes away soon: `NOTICE_S` without a beat, or twice the
longest silence so far if that is more. The exit code is then 75, with the last commit intact.
"""

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ft_dist.errors import EXIT_HUNG, EXIT_PREEMPTED
from ft_dist.observe.files import event_record
from ft_dist.observe.patient import append_to
from ft_dist.preemption.stop import StopRequest
from ft_dist.run_folder import RunFolder

NOTICE_S = 20.0
REPORT_S = 5.0
"""Longest time for the report: its disk may be what hangs"""
STDERR = 2


class Watchdog:
    """Watches from `start` to `close`, on its own thread.

    Time in which the whole process was stopped does not count, so a suspended job survives its suspension.
    """

    def __init__(self, *, timeout_s: float, run_dir: Path, rank: int, stop: StopRequest) -> None:
        self.timeout_s = timeout_s
        self.step = 0
        self._folder, self._rank, self._stop = RunFolder(run_dir), rank, stop
        self._beats = 0
        self._doing, self._limit_s, self._short = "training", timeout_s, True
        self._longest_s = 0.0
        self._tick_s = min(1.0, timeout_s / 10)
        self._closed = threading.Event()
        self._stacks = self._folder.rank_stacks(rank)
        self._descriptor = _open(self._stacks)
        # the launcher requests stacks with SIGQUIT; faulthandler writes them without the interpreter's lock
        faulthandler.register(signal.SIGQUIT, file=self._descriptor, all_threads=True)

    def start(self) -> None:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Report progress."""
        self._beats += 1

    @contextlib.contextmanager
    def during(self, doing: str, *, timeout_s: float) -> Iterator[None]:
        """Inside, work that cannot beat (a commit, the final write) may take `timeout_s`, even after a notice."""
        before = self._doing, self._limit_s, self._short
        self._doing, self._limit_s, self._short = doing, timeout_s, False
        self.beat()
        try:
            yield
        finally:
            self._doing, self._limit_s, self._short = before
            self.beat()

    def close(self) -> None:
        self._closed.set()
        faulthandler.unregister(signal.SIGQUIT)
        if self._descriptor == STDERR:
            return
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
            if self._stacks.stat().st_size == 0:
                self._stacks.unlink()

    def _watch(self) -> None:
        seen, silent_s, at = self._beats, 0.0, time.monotonic()
        while not self._closed.wait(self._tick_s):
            now = time.monotonic()
            if self._beats != seen:
                if self._short:
                    self._longest_s = max(self._longest_s, silent_s)
                seen, silent_s = self._beats, 0.0
            else:
                silent_s += min(now - at, 2 * self._tick_s)
            at = now
            if silent_s >= self._limit_s:
                self._end(silent_s, EXIT_HUNG)
            after_notice_s = min(silent_s, self._stop.wanted_for_s)
            if self._short and after_notice_s >= max(NOTICE_S, 2 * self._longest_s):
                self._end(after_notice_s, EXIT_PREEMPTED)

    def _end(self, silent_s: float, code: int) -> None:
        report = threading.Thread(target=self._report, args=(silent_s, code), daemon=True)
        report.start()
        report.join(REPORT_S)
        os._exit(code)

    def _report(self, silent_s: float, code: int) -> None:
        why = f"asked to stop ({self._stop.reason}), but " if code == EXIT_PREEMPTED else ""
        line = (
            f"rank {self._rank}: {why}no progress for {silent_s:.0f} s in {self._doing} after step {self.step}; "
            f"stacks in {self._stacks}. The last commit is intact. A step that is slow but not stuck needs a "
            f"higher engine.hang_timeout_s ({self.timeout_s:g})."
        )
        with contextlib.suppress(OSError):
            os.write(self._descriptor, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())
        faulthandler.dump_traceback(self._descriptor, all_threads=True)
        with contextlib.suppress(OSError):
            os.write(STDERR, f"ft-dist: {line}\n".encode())
        if self._rank == 0:
            event = event_record("hung", {"step": self.step, "doing": self._doing})
            # a separate descriptor: the main thread may hold the lock of the open file
            with contextlib.suppress(OSError):
                append_to(self._folder.events, json.dumps(event).encode() + b"\n")


def _open(path: Path) -> int:
    """To append to `path`; standard error if it cannot be opened, which is no reason not to train."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError:
        return STDERR
