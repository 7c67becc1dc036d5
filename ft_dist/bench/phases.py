"""Where a step's time goes: forward, backward, optimizer, and the collectives inside them.

Phases are timed in a few separate steps: on a GPU each phase then waits for its kernels, unlike in the steps that the
rates come from. Collectives are timed on the host; on a GPU the profiler reports them.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ft_dist.engine.step import Engine

COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather",
    "all_gather_base",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_base",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "reduce_scatter_coalesced",
    "all_to_all_single",
    "barrier",
)


class Phases:
    """Seconds by phase since it was created or last read by `taken`."""

    def __init__(self, engine: Engine) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._on_gpu = engine.world.device.type == "cuda"
        self._phase: str | None = None
        self._inside = 0
        engine.on_phase = self.timed

    def taken(self) -> dict[str, float]:
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time inside to `phase`."""
        started, self._phase = self._now(), phase
        try:
            yield
        finally:
            self._seconds[phase] += self._now() - started
            self._phase = None

    @contextmanager
    def communication(self) -> Iterator[None]:
        """Inside, time spent in collectives counts as `communication` and not for the phase that it interrupts."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            yield
            return
        if self._on_gpu:
            yield from self._profiled()
            return
        from deepspeed.comm import comm

        # DeepSpeed keeps references to some of torch's functions, so its own methods are timed as well
        places = [(place, name) for place in (dist, comm.cdb) for name in COLLECTIVES if hasattr(place, name)]
        originals = [(place, name, getattr(place, name)) for place, name in places]
        for place, name, call in originals:
            setattr(place, name, self._collective(call))
        try:
            yield
        finally:
            for place, name, call in originals:
                setattr(place, name, call)

    def _collective(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            self._inside += 1
            started = time.perf_counter()
            try:
                work = call(*arguments, **named)
            finally:
                self._inside -= 1
                if not self._inside:  # a collective may call others
                    self._communicated(time.perf_counter() - started)
            outermost = not self._inside and work is not None and hasattr(work, "wait")
            return _TimedWork(work, self._communicated) if outermost else work

        return timed

    def _communicated(self, seconds: float) -> None:
        self._seconds["communication"] += seconds
        if self._phase is not None:
            self._seconds[self._phase] -= seconds

    def _profiled(self) -> Iterator[None]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            yield
            torch.cuda.synchronize()
        micro = sum(event.device_time_total for event in profiler.key_averages() if "nccl" in event.key.lower())
        self._seconds["communication"] += micro / 1e6
        # the profiler does not say when: most reductions and gathers run during backward, the rest in the update
        left = micro / 1e6
        for phase in ("backward", "optimizer", "forward"):
            inside = min(left, self._seconds[phase])
            self._seconds[phase] -= inside
            left -= inside


class _TimedWork:
    """A collective in flight: waiting for it counts too."""

    def __init__(self, work: Any, communicated: Callable[[float], None]) -> None:
        self._work, self._communicated = work, communicated

    def wait(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._work.wait(*arguments)
        finally:
            self._communicated(time.perf_counter() - started)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
