"""What a rank's steps will take on CPU, used once before the libraries that train are imported, which takes as long."""

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
"""An eighth of what full rows of data.max_length would take: a run whose rows are short takes no more than without"""


def touch_planned(config: RunConfig) -> Callable[[], None]:
    """Begin; the result, called before weights are loaded, lets the run have it. Nothing happens on GPUs.

    Where there may be one, AMD's integrated ones too, torch is asked once it is there, and nothing is touched.
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
        return lambda: None  # the checks of the model itself say it better
    return touch_ahead(min(sure_bytes(job), free // (2 * local_ranks)))


def _keep_on_cpu() -> None:
    import torch

    if not torch.cuda.is_available():
        keep_freed_memory()


def sure_bytes(job: Job) -> int:
    """What a step takes whatever its rows are. Frozen weights stay mapped from their files."""
    ledger = Ledger()
    States(job, ledger)
    _, frozen = ledger.live["frozen"]
    passing = max(job.trainable * job.item, (memory_plan(job).tensors - ledger.total) // ACTIVATIONS_SHARE)
    return ledger.total - frozen + passing
