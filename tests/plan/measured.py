"""One rank of a real run under torch's profiler: the bytes of tensors live at the peak of its steps, as JSON.

`python -m tests.plan.measured OUT CONFIG [key=value ...]`. Counted are all allocations of torch's CPU allocator, those
inside operators too, from before the weights are loaded; and the weights that are still pages of their file, which no
allocator has seen.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEP = "ft_dist_measured_step"


def main() -> None:
    out, config_name, *overrides = sys.argv[1:]
    from ft_dist.config import load_config
    from ft_dist.engine.step import Engine
    from ft_dist.preemption.stop import StopRequest
    from ft_dist.train import train

    torch.empty(0)
    mapped: list[int] = []
    original = Engine.train_step

    def noted(self: Engine, *arguments: Any, **options: Any) -> Any:
        mapped.append(mapped_bytes())
        with record_function(STEP):
            return original(self, *arguments, **options)

    Engine.train_step = noted  # type: ignore[method-assign]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        train(load_config(config_name, overrides), StopRequest())
    starts, peaks, startup = peaks_of(profiler)
    result = {"peak_bytes": [peak + mapped[i] for i, peak in enumerate(peaks)], "mapped_bytes": mapped[0]}
    result |= {"at_start_bytes": [start + mapped[0] for start in starts], "startup_bytes": startup}
    Path(out).write_text(json.dumps(result))


def mapped_bytes() -> int:
    """Bytes of storages that are mapped files."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            if storage.filename is not None:
                found[thing.data_ptr()] = thing.numel() * thing.element_size()
    return sum(found.values())


def peaks_of(profiler: Any) -> tuple[list[int], list[int], int]:
    """Bytes live at the start and the peak of every step, and the peak before the first."""
    events = profiler.profiler.kineto_results.events()
    steps = sorted((e.start_ns(), e.end_ns()) for e in events if e.name() == STEP)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live, startup = 0, 0
    starts, peaks = [-1] * len(steps), [0] * len(steps)
    step = 0
    for when, nbytes in changes:
        while step < len(steps) and when > steps[step][1]:
            step += 1
        if step == len(steps):
            break
        if when >= steps[step][0]:
            if starts[step] < 0:
                starts[step] = live
            peaks[step] = max(peaks[step], live + nbytes)
        elif step == 0:
            startup = max(startup, live + nbytes)
        live += nbytes
    return starts, peaks, startup


if __name__ == "__main__":
    main()
