"""Touches the memory that a rank's steps will need on CPU, while the training libraries are imported."""

import os
from collections.abc import Callable
from pathlib import Path

from ft_dist.config.schema import RunConfig
from ft_dist.errors import UserError
from ft_dist.heap import keep_freed_memory, touch_ahead
from ft_dist.plan.gpu import free_host_memory, gpus_here
from ft_dist.plan.job import Job, job_of
from ft_dist.plan.memory.ledger import Ledger
from ft_dist.plan.memory.states import States
from ft_dist.plan.memory.total import memory_plan

ACTIVATIONS_SHARE = 8
"""Touch an eighth of what full rows of data.max_length need, so that a run with short rows takes no extra memory"""


def touch_planned(config: RunConfig) -> Callable[[], None]:
    """Start touching; call the result before weights are loaded to hand the memory to the run. Does nothing on GPUs.

    If a GPU may exist (AMD's integrated ones included), nothing is touched, and torch is asked once it is loaded.
    """
    free = free_host_memory()
    if gpus_here() or Path("/dev/kfd").exists() or not free:
        return _keep_on_cpu
    keep_freed_memory()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        job = job_of(config, ranks=ranks, ranks_per_node=local_ranks, gpu=False, flash=False)
    except UserError:
        return lambda: None  # the model's own checks give a better error
    return touch_ahead(min(sure_bytes(job), free // (2 * local_ranks)))


def _keep_on_cpu() -> None:
    import torch

    if not torch.cuda.is_available():
        keep_freed_memory()


def sure_bytes(job: Job) -> int:
    """What a step needs with any rows. Frozen weights stay mapped from their files."""
    ledger = Ledger()
    States(job, ledger)
    _, frozen = ledger.live["frozen"]
    passing = max(job.trainable * job.item, (memory_plan(job).tensors - ledger.total) // ACTIVATIONS_SHARE)
    return ledger.total - frozen + passing
