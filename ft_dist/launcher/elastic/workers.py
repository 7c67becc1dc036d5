"""Start, signal and stop the worker processes of this machine, keep their exit codes, and leave no orphans.

torchrun reduces its workers' exit codes to 1 and leaves orphans when it is killed, but schedulers need 75 and 2. So the
agent starts the workers itself, each in its own session. On Linux the parent-death signal ends them with the agent. A
guard, a shell that waits for the agent's end of a pipe to close, ends their own children (elsewhere the workers too).
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from ft_dist.errors import EXIT_FINISHED, EXIT_PREEMPTED
from ft_dist.launcher.machine import FORWARDED, threads_per_worker

GRACE_S = 2.0
"""After a peer has failed, workers get this long to fail on their own, since they often log why"""
PR_SET_PDEATHSIG = 1
GUARD = (
    'while read -r line; do groups=$line; done; for group in $groups; do kill -s KILL -- "-$group"; done 2>/dev/null'
)


@dataclass(frozen=True)
class Share:
    """This machine's part of one round: ranks `first_rank` to `first_rank + nproc - 1` of `world_size`."""

    round: int
    first_rank: int
    nproc: int
    world_size: int
    node_rank: int
    nodes: int
    master_addr: str
    master_port: int


@dataclass(frozen=True)
class WorkerExit:
    """How a worker ended. `code` is negative for a signal, None if we killed it because others had failed."""

    rank: int
    code: int | None


class Workers:
    """`python -m MODULE ARGUMENTS` on every rank of this machine's share, one round at a time.

    Always `close` it. Main thread only: the parent-death signal is tied to the thread that forks.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        module: str,
        stdin: IO[bytes] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Workers share `stdin`, and its position."""
        self._command = [sys.executable, "-m", module, *arguments]
        self._stdin = stdin
        self.environment = dict(environment or {})
        """Added to this process's own, for workers started from now on"""
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._signals_sent: set[int] = set()
        self._kill_at: float | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return bool(self._running)

    def start(self, share: Share) -> None:
        assert not self._running, "the previous round has not ended"
        self._signals_sent, self._kill_at = set(), None
        for local_rank in range(share.nproc):
            rank = share.first_rank + local_rank
            self._running[rank] = subprocess.Popen(
                self._command,
                stdin=self._stdin,
                env=os.environ | self.environment | _environment(share, local_rank),
                # its own session, so that Ctrl-C reaches the workers once, through the agent
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
            self._update_guard()

    def signal(self, number: int) -> None:
        """Send a signal to every running worker."""
        self._signals_sent.add(number)
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(number)

    def stop(self) -> None:
        """End the round: workers that still run after GRACE_S are killed."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + GRACE_S

    def ended(self) -> list[WorkerExit]:
        """The workers that have ended since the last call."""
        found = [self._reap(rank) for rank, process in list(self._running.items()) if process.poll() is not None]
        if self._running and self._kill_at is not None and time.monotonic() >= self._kill_at:
            found += self.kill()
        if found:
            self._update_guard()
        return found

    def kill(self) -> list[WorkerExit]:
        """Kill every worker and its children."""
        found = []
        for rank, process in list(self._running.items()):
            over = process.poll() is not None
            _kill_group(process.pid)
            process.wait()
            found.append(self._reap(rank) if over else WorkerExit(rank, None))
            self._running.pop(rank, None)
        return found

    def close(self) -> None:
        self.kill()
        if self._guard and self._guard.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._update_guard()
                self._guard.stdin.close()
            self._guard.wait()

    def _reap(self, rank: int) -> WorkerExit:
        process = self._running.pop(rank)
        code = process.returncode
        if code != EXIT_FINISHED:
            # its children (data-loading processes) may still run
            _kill_group(process.pid)
        # a worker that was signalled before it installed its handlers has nothing to save
        return WorkerExit(rank, EXIT_PREEMPTED if -code in self._signals_sent & set(FORWARDED) else code)

    def _update_guard(self) -> None:
        """Send the guard the current process groups; it kills those of the last line it received."""
        if self._guard is None:
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", GUARD],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        assert self._guard.stdin
        line = " ".join(str(process.pid) for process in self._running.values())
        with contextlib.suppress(BrokenPipeError):  # the guard was killed; the parent-death signal still works
            self._guard.stdin.write(f"{line}\n".encode())
            self._guard.stdin.flush()


def _environment(share: Share, local_rank: int) -> dict[str, str]:
    return {
        "FT_DIST_ROUND": str(share.round),
        "RANK": str(share.first_rank + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(share.world_size),
        "LOCAL_WORLD_SIZE": str(share.nproc),
        "GROUP_RANK": str(share.node_rank),
        "GROUP_WORLD_SIZE": str(share.nodes),
        "MASTER_ADDR": share.master_addr,
        "MASTER_PORT": str(share.master_port),
        "GLIBC_TUNABLES": _with_huge_pages(os.environ.get("GLIBC_TUNABLES", "")),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_per_worker(share.nproc))),
    }


def _with_huge_pages(tunables: str) -> str:
    """Have glibc request huge pages, which some kernels only give on request. On CPU this cut the first step of full
    fine-tuning of SmolLM2-135M from 4.5 s to 1.7 s, and later steps by a tenth. An older glibc ignores the name."""
    return (
        tunables if "glibc.malloc.hugetlb" in tunables else ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
    )


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
