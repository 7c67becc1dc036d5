"""One rank of a real run under torch's profiler: the bytes of tensors live at the peak of its steps, as JSON.

`python -m tests.plan.measured OUT CONFIG [key=value ...]`. Tensors alive when a step begins are counted one by one
(threads load weights and map them from files, which no profiler sees); the growth within the step comes from torch's
CPU allocator, including what operators allocate inside.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

STEP = "ft_dist_measured_step"


def main() -> None:
    out, config_name, *overrides = sys.argv[1:]
    from ft_dist.config import load_config
    from ft_dist.engine.step import Engine
    from ft_dist.preemption.stop import StopRequest
    from ft_dist.train import train

    count_all_threads()
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


def count_all_threads() -> None:
    """Make torch's running total of CPU memory include threads without a profiler: those of gloo free buffers too."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


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
    """The growth of memory within each step, from the allocator's running total (see `count_all_threads`).

    Summing the events would drift, because the profiler has no event for what another thread frees.
    """
    events = profiler.profiler.kineto_results.experimental_event_tree()
    for event in events:
        events.extend(event.children)
    steps = sorted((event.start_time_ns, event.end_time_ns) for event in events if event.name == STEP)
    totals = sorted(
        (event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size)
        for event in events
        if event.tag == _EventType.Allocation
    )
    growths = []
    for begin, end in steps:
        within = [(total, size) for when, total, size in totals if begin <= when <= end]
        first_total, first_size = within[0]
        growths.append(max(total for total, _ in within) - (first_total - first_size))
    return growths


if __name__ == "__main__":
    main()
