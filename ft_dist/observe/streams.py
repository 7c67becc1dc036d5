"""Standard output and error of a run, which may vanish, fill up or stand still without ending the run.

`ft-dist train ... | head -1` closes the pipe, a closed terminal fails with EIO, a paused one takes nothing, and
`ft-dist train >&-` starts without one. Whatever prints (we, tqdm, the logging of DeepSpeed and transformers) writes to
`SafeStream`, which never raises and waits at most WAIT_S. The rank's log file gets everything.
"""

import contextlib
import errno
import os
import select
import sys
import threading
import time
from typing import Any

from ft_dist.observe.patient import PatientFile

WAIT_S = 5.0
"""How long a console that takes nothing holds up the run, once; then its lines are left out until it takes some"""
HELD_BYTES = 8192
"""Text without an end of line is written once it is that long"""


class SafeStream:
    """A text stream to a descriptor and, once `copy_to` was called, to a file. Written line by line."""

    def __init__(self, descriptor: int, original: Any) -> None:
        self._descriptor, self._original = unblocking(descriptor), original
        self._copy: PatientFile | None = None
        self._gone = self._stuck = False
        self._left_out = 0
        self._held = ""
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=self._renew_lock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def copy_to(self, file: PatientFile, *, only: bool = False) -> None:
        """From now on write to `file` too, or `only` there."""
        self._copy, self._gone = file, self._gone or only

    def write(self, text: str) -> int:
        with self._lock:
            self._held += text
            if "\n" in text or len(self._held) > HELD_BYTES:
                self.flush()
        return len(text)

    def flush(self) -> None:
        with self._lock:
            text, self._held = self._held, ""
            content = text.encode(self.encoding or "utf-8", "replace")
            if not content:
                return
            if self._copy:
                self._copy.write_bytes(content)
            with contextlib.suppress(ValueError):  # poll refuses a descriptor that is no longer open
                self._send(content)

    def _send(self, content: bytes) -> None:
        if self._gone:
            return
        if self._left_out and self._takes_more():
            content = f"[{self._left_out} lines are left out here; the run's logs have them]\n".encode() + content
            self._left_out = 0
        while content:
            if not self._takes_more():
                self._left_out += content.count(b"\n")
                return
            try:
                # a pipe with room takes PIPE_BUF bytes without blocking
                content = content[os.write(self._descriptor, content[: select.PIPE_BUF]) :]
            except BlockingIOError:
                time.sleep(0.01)
            except OSError as error:
                self._left_out += content.count(b"\n")
                self._gone = error.errno in (errno.EPIPE, errno.EBADF, errno.EIO)
                return

    def _takes_more(self) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        self._stuck = not poll.poll(0 if self._stuck else WAIT_S * 1000)
        return not self._stuck

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()


def secure_streams() -> None:
    """Make the standard streams of this process safe. Call it first: a file opened later would else take the number of
    a closed descriptor, and get what native code prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for the life of the process
        if not isinstance(stream, SafeStream) and _descriptor_of(stream) == number:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            setattr(sys, name, SafeStream(number, stream))


def unblocking(number: int) -> int:
    """For a terminal, another descriptor of it whose writes never block: with room for a byte, a longer write blocks.
    The flag would otherwise hold for every process that has the terminal open."""
    if os.isatty(number):
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return number


def copy_streams(file: PatientFile, *, only: bool) -> None:
    """Copy what is printed to `file`; `only`: the console gets nothing more of it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, SafeStream):
            stream.copy_to(file, only=only)


def _descriptor_of(stream: Any) -> int | None:
    """None for a stream that somebody put in place of the process's own."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return int(stream.fileno())
    return None
