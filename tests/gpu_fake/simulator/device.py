"""A simulated H100: tensors on `cuda` have shapes but no values, and the Python side of torch.cuda describes the chip.

Call `simulate()` first in a process, before torch is imported. It changes torch for the whole process, so every use
runs in its own process. Nothing computes: every value (a loss, a norm) reads as 0.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

from tests.gpu_fake.simulator import library

MEMORY_BYTES = 80 << 30
SHARED_MEMORY_BYTES = 232_448
"""Opt-in limit of a thread block on sm_90"""
GRID = (2**31 - 1, 65_535, 65_535)
CAPABILITY = (9, 0)
LISTENERS: list[Callable[[str], None]] = []
"""Called for every explicit wait of the host: torch.cuda.synchronize, a stream's or an event's"""


def simulate() -> None:
    """Make this process see a GPU. The Triton kernels that it compiles are cached."""
    library.load()
    os.environ["DS_ACCELERATOR"] = "cuda"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    # compiled for a device, so the interpreter must be off
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(library.cache_dir() / "triton"))
    import torch

    torch.set_num_threads(1)
    _answer_for_the_chip(torch)
    _make_streams(torch)
    _let_tensors_be_fake(torch)
    from tests.gpu_fake.simulator import attention, launches

    launches.compile_only()
    attention.on_device()


def _waits(kind: str) -> Any:
    def wait(*_: Any, **__: Any) -> None:
        for listener in LISTENERS:
            listener(kind)

    return wait


def _answer_for_the_chip(torch: Any) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=MEMORY_BYTES,
        multi_processor_count=132,
        warp_size=32,
        L2_cache_size=50 << 20,
        shared_memory_per_multiprocessor=233_472,
        shared_memory_per_block_optin=SHARED_MEMORY_BYTES,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048,
        gcnArchName="",
    )
    answers: dict[str, Any] = {
        "current_device": 0,
        "device_count": 1,
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "get_device_properties": properties,
        "get_device_capability": CAPABILITY,
        "get_device_name": properties.name,
        "mem_get_info": (MEMORY_BYTES, MEMORY_BYTES),
        "memory_stats": defaultdict(int),
        "initial_seed": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }
    zeros = "memory_allocated max_memory_allocated memory_reserved max_memory_reserved memory_cached max_memory_cached"
    nothing = "set_device empty_cache reset_peak_memory_stats reset_max_memory_allocated manual_seed manual_seed_all"
    nothing += " ipc_collect set_rng_state init _lazy_init"
    answers |= dict.fromkeys(zeros.split(), 0) | dict.fromkeys(nothing.split())
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.synchronize = _waits("torch.cuda.synchronize")
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None


class Event:
    """An event on a stream. All events are past; waiting for one means waiting for the device."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.synchronize = _waits("event.synchronize")

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class Stream:
    """The device's one stream."""

    device_index = stream_id = cuda_stream = 0
    device_type = 1

    def __init__(self, *_: Any, **__: Any) -> None:
        import torch

        self.device = torch.device("cuda", 0)
        self.synchronize = _waits("stream.synchronize")

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> Event:
        return Event()

    def query(self) -> bool:
        return True


def _make_streams(torch: Any) -> None:
    torch.cuda.Stream, torch.cuda.Event = Stream, Event
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: Stream()
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda *_: None
    torch.Tensor.pin_memory = lambda tensor, *_: tensor


def _let_tensors_be_fake(torch: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    FakeTensorMode.avoid_device_init = property(lambda _: True)
    # torch uses the foreach and fused forms of an update only for these exact types
    for types in (optimizer._foreach_supported_types, _foreach_utils._foreach_supported_types):
        types.append(FakeTensor)
    # one wait for all values; FakeTensor reads them one by one
    FakeTensor.tolist = _tolist
    torch.nn.Module._apply = _apply


def _tolist(tensor: Any) -> Any:
    if tensor.numel():
        tensor.reshape(-1)[0].item()

    def nested(shape: tuple[int, ...]) -> Any:
        return [nested(shape[1:]) for _ in range(shape[0])] if shape else 0

    return nested(tuple(tensor.shape))


def _apply(module: Any, change: Any, recurse: bool = True) -> Any:
    """nn.Module._apply puts the moved data into the old parameter, but a fake tensor cannot take another's storage."""
    import torch

    if recurse:
        for child in module.children():
            child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = change(parameter)
            if (moved.dtype, moved.device) != (parameter.dtype, parameter.device):
                module._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


@cache
def fake_tensors() -> Any:
    """The mode in which new tensors have no values. Real tensors may be read; results computed from them are fake.

    One per process: tensors that the product keeps from one step must fit the next one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)
