"""Facts of this machine: whether a launcher has set our rank, GPUs, default workers, cores, and signals to forward."""

import os
import signal
from pathlib import Path

from ft_dist.errors import EXIT_PREEMPTED
from ft_dist.preemption.signals import SIGNALS, heeded

FORWARDED = SIGNALS
"""Signals that the agent forwards to its workers, which then commit and exit; it ignores SIGHUP if it was started so"""


def launched() -> bool:
    """True if a launcher (torchrun, srun, ours) has already given this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def default_nproc() -> int:
    """One worker per visible GPU, or 1 on CPU."""
    return max(1, gpus())


def gpus() -> int:
    """Number of visible GPUs, found without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


def threads_per_worker(nproc: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // nproc)


def exit_on_signal() -> None:
    """Until workers run there is nothing to save, so a signal ends this process with 75."""
    for number in heeded():
        signal.signal(number, lambda *_: os._exit(EXIT_PREEMPTED))
