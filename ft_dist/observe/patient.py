"""Files that record a run and may never end it: what a full or failing disk refuses waits in memory.

No method raises OSError. A refused write is repeated with the next one, but at most once a second, and never for more
than a tenth of the time. `outages` says what happened, for the console and the events.
"""

import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

WAITING_BYTES = 16 << 20
"""What waits beyond this is dropped, the oldest first"""
RETRY_S = 1.0
LAST_TRIES_S = 3.0
"""How long `close` tries: the fault of a run of a few seconds may be younger than RETRY_S"""
SLOW_SHARE = 10.0
"""A failing write that takes long is repeated after so many times its duration"""


@dataclass(frozen=True)
class Outage:
    """A file could not be written: `over` is False when that begins, and True when it works again.

    `waited` and `dropped` count lines.
    """

    file: Path
    reason: str
    over: bool = False
    waited: int = 0
    dropped: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        if not self.over:
            return f"{self.file}: cannot be written ({self.reason}). Training continues, and its lines wait"
        lost = f", {self.dropped:,} were dropped" if self.dropped else ""
        return f"{self.file}: written again after {self.seconds:.0f} s; {_lines(self.waited)} had waited{lost}"


class PatientFile(ABC):
    """Writes in order; a subclass decides how. May be used by several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._dropped = self._waited = 0
        self._reason = ""
        self._failing_since: float | None = None
        self._retry_at = 0.0
        self._outages: list[Outage] = []
        self._lock = threading.RLock()
        _renew_lock_after_fork(self)

    @abstractmethod
    def _put(self, content: bytes) -> None:
        """Write all of `content` or nothing. Raises OSError."""

    def write_bytes(self, content: bytes) -> None:
        with self._lock:
            self._waiting.append(content)
            self._waiting_bytes += len(content)
            self.flush()
            while self._waiting_bytes > WAITING_BYTES:
                oldest = self._waiting.popleft()
                self._waiting_bytes -= len(oldest)
                self._dropped += oldest.count(b"\n")

    def flush(self, *, now: bool = False) -> None:
        """Write what waits, if it is time to try; `now`: in any case."""
        with self._lock:
            if not self._waiting or (not now and time.monotonic() < self._retry_at):
                return
            started = time.monotonic()
            if self._failing_since is not None:
                self._waited = self._lines_waiting()
            try:
                while self._waiting:
                    self._put(self._waiting[0])
                    self._waiting_bytes -= len(self._waiting.popleft())
            except OSError as error:
                self._refused(error, started)
            else:
                self._accepted()

    def outages(self) -> list[Outage]:
        """Since the last call. Tries again first."""
        with self._lock:
            self.flush()
            found, self._outages = self._outages, []
            return found

    def close(self) -> str:
        """Try for up to LAST_TRIES_S; returns a line on what is lost, or ""."""
        until = time.monotonic() + LAST_TRIES_S
        with self._lock:
            self.flush(now=True)
            while self._waiting and time.monotonic() < until:
                time.sleep(LAST_TRIES_S / 10)
                self.flush(now=True)
            lost = self._dropped + self._lines_waiting()
            self._waiting.clear()
            return f"{self.path}: {_lines(lost)} could not be written ({self._reason})" if lost else ""

    def _lines_waiting(self) -> int:
        return sum(content.count(b"\n") for content in self._waiting)

    def _refused(self, error: OSError, started: float) -> None:
        now = time.monotonic()
        self._reason = error.strerror or str(error)
        if self._failing_since is None:
            self._failing_since = started
            self._outages.append(Outage(self.path, self._reason))
        self._retry_at = now + max(RETRY_S, SLOW_SHARE * (now - started))

    def _accepted(self) -> None:
        if self._failing_since is not None:
            seconds = time.monotonic() - self._failing_since
            self._outages.append(Outage(self.path, self._reason, True, self._waited, self._dropped, seconds))
        self._failing_since, self._dropped, self._retry_at = None, 0, 0.0


class AppendedFile(PatientFile):
    """Appends, unbuffered. `before_opening` runs once, before the file is opened for the first time."""

    def __init__(self, path: Path, *, lines: bool, before_opening: Callable[[Path], None] | None = None) -> None:
        """`lines`: only whole lines are written, even after somebody has left a part of one."""
        super().__init__(path)
        self._whole_lines = lines
        self._before_opening = before_opening
        self._descriptor: int | None = None

    def open(self) -> int | None:
        """The descriptor, or None if the file cannot be opened now."""
        with self._lock, suppress(OSError):
            return self._open()
        return None

    def _open(self) -> int:
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._before_opening:
                self._before_opening(self.path)
                self._before_opening = None
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        return self._descriptor

    def _put(self, content: bytes) -> None:
        append(self._open(), content, lines=self._whole_lines)

    def _refused(self, error: OSError, started: float) -> None:
        super()._refused(error, started)
        self._close()  # a file server that was restarted needs a new descriptor

    def close(self) -> str:
        with self._lock:
            lost = super().close()
            self._close()
            return lost

    def _close(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


class ReplacedFile(PatientFile):
    """Replaces its content as a whole; of what waits, only the newest counts."""

    def write_text(self, text: str) -> None:
        with self._lock:
            self._waiting.clear()
            self._waiting_bytes = 0
            self.write_bytes(text.encode())

    def _put(self, content: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace(self.path, content)


def append(descriptor: int, content: bytes, *, lines: bool = True) -> None:
    """Append all of `content` or nothing to a file that is open for reading and appending. Raises OSError.

    With `lines`, a line that somebody else left incomplete is ended first.
    """
    before = os.fstat(descriptor).st_size
    if lines and before and os.pread(descriptor, 1, before - 1) != b"\n":
        content = b"\n" + content
    done = 0
    try:
        while done < len(content):
            done += os.write(descriptor, content[done:])
    except OSError:
        # unless another process has appended meanwhile
        with suppress(OSError):
            if done and os.fstat(descriptor).st_size == before + done:
                os.ftruncate(descriptor, before)
        raise


def append_to(path: Path, content: bytes) -> None:
    """Append whole lines to a file that other processes append to as well. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        append(descriptor, content)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes) -> None:
    """Write, sync, rename, sync the folder: after a power cut `path` has the old or the new content. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lines(count: int) -> str:
    return f"{count:,} line{'' if count == 1 else 's'}"


def _renew_lock_after_fork(file: PatientFile) -> None:
    """A forked child must not inherit a lock that another thread held."""
    place = weakref.ref(file)

    def renew() -> None:
        if found := place():
            found._lock = threading.RLock()

    os.register_at_fork(after_in_child=renew)
