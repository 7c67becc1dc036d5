"""One run at a time per output_dir: rank 0 locks a file in it for the life of its process.

The lock is the kernel's (`fcntl.lockf`), so it ends with the process however that ends, and a file left behind blocks
nobody. We do not use `flock`: children that are forked, such as data-loading processes, share it, so one that outlives
a killed rank would keep the folder locked. The price is that closing any descriptor of the file drops the lock of the
whole process; only this module opens the file, and it never closes the descriptor that holds the lock. On NFS and
parallel file systems, both kinds of lock are held by the server and seen by every node.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from ft_dist.errors import ConfigError
from ft_dist.run_folder import RunFolder

WAIT_S = 5.0
"""A killed process of this machine is gone within this time"""
OTHER_HOST_WAIT_S = 120.0
"""A file server drops the locks of a machine that it has not heard from for 90 s (the lease of NFSv4)"""
NOTE_S = 1.0
POLL_S = 0.1
MOST_BYTES = 4096

Say = Callable[[str], None]


@dataclass(frozen=True)
class Holder:
    """The process that holds the lock, as it describes itself in the file."""

    host: str
    pid: int
    since: str
    """Local time, with the offset from UTC"""
    slurm_job: str | None

    def __str__(self) -> str:
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        return f"{self.host}, pid {self.pid}, since {self.since}{job}"


def lock_folder(run_dir: Path, *, say: Say) -> None:
    """Create `run_dir` if needed and lock it until this process ends; waits for a holder that may be ending.

    If the file system has no locks, `say` one line and return. Raises ConfigError if another run holds the lock, or the
    file cannot be created.
    """
    path = RunFolder(run_dir).lock
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(
            f"output_dir={run_dir}: cannot write {path} ({error.strerror}). Choose another output_dir."
        ) from None
    if _wait_for(descriptor, fcntl.LOCK_EX, run_dir, say):
        mine = json.dumps(asdict(_this_process())).encode()
        with suppress(OSError):  # the lock holds without a name in the file
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, mine, 0)


def refuse_if_locked(run_dir: Path, *, say: Say) -> None:
    """Raise ConfigError as `lock_folder` does, but lock nothing and create nothing.

    Not for a process that holds the lock: it would lose it.
    """
    try:
        descriptor = os.open(RunFolder(run_dir).lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no run has started there
        return
    try:
        _wait_for(descriptor, fcntl.LOCK_SH, run_dir, say)
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, kind: int, run_dir: Path, say: Say) -> bool:
    """Lock the file; False if its file system has no locks. Raises ConfigError once waiting is useless."""
    started, noted = time.monotonic(), False
    while True:
        try:
            if _locked(descriptor, kind):
                return True
        except OSError as error:
            say(
                f"note: output_dir={run_dir}: its file system has no locks ({error.strerror}), so nothing stops a "
                "second run from writing there"
            )
            return False
        holder = _holder(descriptor)
        waited_s = time.monotonic() - started
        elsewhere = holder is not None and holder.host != socket.gethostname()
        if waited_s >= (OTHER_HOST_WAIT_S if elsewhere else WAIT_S):
            raise ConfigError(
                f"output_dir={run_dir}: is in use by another run ({holder or 'which has just started'}). "
                "Wait for it, or choose another output_dir."
            )
        if elsewhere and not noted and waited_s >= NOTE_S:
            noted = True
            say(
                f"waiting up to {OTHER_HOST_WAIT_S:.0f} s for the lock of output_dir={run_dir}, in case its holder is "
                f"gone ({holder})"
            )
        time.sleep(POLL_S)


def _locked(descriptor: int, kind: int) -> bool:
    """Whether the lock is now ours. Raises OSError if the file system has no locks."""
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _holder(descriptor: int) -> Holder | None:
    """None if the file does not say, because the holder has only just locked it."""
    with suppress(OSError, ValueError, TypeError):
        return Holder(**json.loads(os.pread(descriptor, MOST_BYTES, 0)))
    return None


def _this_process() -> Holder:
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    return Holder(socket.gethostname(), os.getpid(), now, os.environ.get("SLURM_JOB_ID"))
