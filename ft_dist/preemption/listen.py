"""Sources of stop requests other than signals."""

import os
import time
from collections.abc import Callable

from ft_dist.config.schema import PreemptionConfig
from ft_dist.preemption.cloud import CloudPoller
from ft_dist.preemption.slurm import TimeLimit, job_ends_at
from ft_dist.preemption.stop import StopRequest


def listen_for_notices(
    settings: PreemptionConfig, stop: StopRequest, *, rank: int, note: Callable[[str], None]
) -> list[str]:
    """Listen to the cloud on one rank per node, and to the job's time limit on rank 0.

    Returns one line for each.
    """
    lines = []
    if settings.cloud != "none":
        lines.append(f"preemption: a notice from {settings.cloud} ends the run with a commit")
        if int(os.environ.get("LOCAL_RANK", rank)) == 0:
            CloudPoller(settings.cloud, endpoint=settings.endpoint, ask=stop.ask, say=note)
    ends_at = job_ends_at() if rank == 0 else None
    if ends_at is not None:
        stop.time_limit = TimeLimit(ends_at, settings.margin_s)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ends_at))
        lines.append(
            f"preemption: the job's time limit is {at}; stops {settings.margin_s} s, a step and a commit earlier"
        )
    return lines
