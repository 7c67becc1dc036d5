"""Planned against measured memory and step time, for summary.json."""

import statistics
from collections import deque
from typing import Any

import torch

from ft_dist.config.schema import RunConfig
from ft_dist.distributed import World
from ft_dist.errors import UserError
from ft_dist.plan.gpu import gpu_like
from ft_dist.plan.job import job_of
from ft_dist.plan.memory.total import memory_plan
from ft_dist.plan.speed import step_plan

STEPS = 1000
"""The median step time is that of the last steps"""


class Planned:
    """Planned on rank 0 when the run starts; None if the planner does not know the model or the GPU."""

    def __init__(self, config: RunConfig, world: World, *, flash: bool) -> None:
        self.peak_bytes: int | None = None
        self.step_s: float | None = None
        self._took_s: deque[float] = deque(maxlen=STEPS)
        if not world.is_main:
            return
        gpu = world.device.type == "cuda"
        try:
            job = job_of(config, ranks=world.size, ranks_per_node=world.local_size, gpu=gpu, flash=flash)
        except UserError:
            return
        memory = memory_plan(job)
        # matches peak_memory_bytes: the allocator's tensors on a GPU, the whole process on CPU
        self.peak_bytes = memory.tensors if gpu else memory.peak
        chip = gpu_like(torch.cuda.get_device_name(world.device)) if gpu else None
        self.step_s = step_plan(job, chip).seconds if chip else None

    def step_took(self, seconds: float) -> None:
        self._took_s.append(seconds)

    def comparison(self) -> dict[str, Any]:
        return {
            "planned_peak_bytes": self.peak_bytes,
            "planned_step_s": None if self.step_s is None else round(self.step_s, 6),
            "step_s": round(statistics.median(self._took_s), 6) if self._took_s else None,
        }
