"""One rank of a real run under torch's profiler: the bytes of tensors live at the peak of its steps, as JSON.

`python -m tests.plan.measured OUT CONFIG [key=value ...]`. Tensors alive when a step begins are counted one by one
(threads load weights and map them from files, which no profiler sees); allocations within the step come from the
events of torch's CPU allocator, including those inside operators.
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
    held: list[int] = []
    original = Engine.train_step

    def noted(self: Engine, *arguments: Any, **options: Any) -> Any:
        held.append(held_bytes())
        with record_function(STEP):
            return original(self, *arguments, **options)

    Engine.train_step = noted  # type: ignore[method-assign]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        train(load_config(config_name, overrides), StopRequest())
    growths = growths_of(profiler)
    result = {"peak_bytes": [start + growth for start, growth in zip(held, growths, strict=True)], "held_bytes": held}
    Path(out).write_text(json.dumps(result))


def held_bytes() -> int:
    """Bytes of all storages of weights, gradients, state and buffers. Token ids are not included, because they are in
    numpy's memory."""
    found: dict[int, int] = {}
    gc.unfreeze()  # a run freezes the objects that exist before its first step, and get_objects() omits frozen ones
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            if thing.dtype != torch.int64:
                # of a mapped file, only the part that the tensor covers
                mapped = storage.filename is not None
                place = thing.data_ptr() if mapped else storage.data_ptr()
                found[place] = thing.numel() * thing.element_size() if mapped else storage.nbytes()
    found.pop(0, None)
    return sum(found.values())


def growths_of(profiler: Any) -> list[int]:
    """The growth of memory within each step."""
    events = profiler.profiler.kineto_results.events()
    steps = sorted((e.start_ns(), e.end_ns()) for e in events if e.name() == STEP)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    growths = []
    for begin, end in steps:
        live = peak = 0
        for when, nbytes in changes:
            if begin <= when <= end:
                live += nbytes
                peak = max(peak, live)
        growths.append(peak)
    return growths


if __name__ == "__main__":
    main()
