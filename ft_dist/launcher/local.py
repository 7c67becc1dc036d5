"""Start one worker a device on this machine, pass signals on, and end with one honest exit code.

torchrun flattens its workers' exit codes to 1 and leaves orphans when it is killed; schedulers need 75 and 2, so the
workers are our own children: they die with us (Linux's parent-death signal) and their codes are told apart.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from ft_dist.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_HUNG, EXIT_PREEMPTED, EXIT_USER

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
POLL_S = 0.05
PR_SET_PDEATHSIG = 1


def launched() -> bool:
    """True if some launcher (torchrun, srun, ours) has already given this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def default_nproc() -> int:
    """One worker a visible GPU, or 1 on CPU; found without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"]))
    return max(1, sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*")))


def run_workers(arguments: Sequence[str], *, nproc: int) -> int:
    """Run `python -m ft_dist.train ARGUMENTS` on `nproc` ranks; returns the exit code of the whole.

    See `combined` for the code. A worker that dies takes the others down: they would wait for it in a collective.
    """
    port = _free_port()
    workers = [_start(arguments, rank, nproc, port) for rank in range(nproc)]
    told: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        told.append(number)
        _signal(workers, number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        codes = _wait(workers, told)
        # a worker that was told to stop before it could listen has nothing to save
        return combined([EXIT_PREEMPTED if -code in told else code for code in codes])
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(arguments: Sequence[str], rank: int, nproc: int, port: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_per_worker(nproc))),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "ft_dist.train", *arguments],
        env=environment,
        # a session of its own: Ctrl-C reaches the workers once, through `forward`
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def threads_per_worker(nproc: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // nproc)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_when_told() -> None:
    """Until workers run there is nothing to save: a signal ends this process with 75."""
    for number in FORWARDED:
        signal.signal(number, lambda *_: os._exit(EXIT_PREEMPTED))


def _wait(workers: list[subprocess.Popen[bytes]], told: list[int]) -> list[int]:
    while True:
        codes = [worker.poll() for worker in workers]
        ended = [code for code in codes if code is not None]
        if len(ended) == len(workers):
            return ended
        if EXIT_PREEMPTED in ended and not told:
            # a worker that was told by others has left, so the run is committed or has not begun; the rest may wait
            # for it
            told.append(signal.SIGTERM)
            _signal(workers, signal.SIGTERM)
        if EXIT_HUNG in ended:
            print("ft-dist: a rank made no progress; the stacks of all are in output_dir/logs", file=sys.stderr)
            # one that is stopped must go on in order to answer
            _signal(workers, signal.SIGQUIT)
            _signal(workers, signal.SIGCONT)
        if any(code not in (EXIT_FINISHED, EXIT_PREEMPTED) for code in ended):
            return _end_the_rest(workers)
        time.sleep(POLL_S)


def _end_the_rest(workers: list[subprocess.Popen[bytes]], grace_s: float = 2.0) -> list[int]:
    """Give the others a moment to fail by themselves (they often say why), then kill them."""
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
        time.sleep(POLL_S)
    own = [worker.returncode for worker in workers if worker.poll() is not None]
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
    return own


def _signal(workers: list[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def combined(codes: Sequence[int]) -> int:
    """The code of the whole: the first of these that any worker gave, or 1 if one gave another.

    2, the user must mend something; 75, safe to requeue (workers leave with it when the run is committed or has not
    begun, whatever becomes of those that lose them); 76, one hung. 0 if all finished.
    """
    for code in (EXIT_USER, EXIT_PREEMPTED, EXIT_HUNG):
        if code in codes:
            return code
    return EXIT_FINISHED if all(code == EXIT_FINISHED for code in codes) else EXIT_FAILED


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
