"""Counts what a step asks of the device: operations, launches, host waits and bytes held, by phase.

An operation is a PyTorch call on the device other than a view or an allocation. A launch is a Triton kernel, or an
operation times the kernels that it is known to start. A wait is a point where the host blocks until the device has
caught up: a value read, a size that depends on values, or a copy without non_blocking.
"""

import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.gpu_fake.simulator import attention, device, launches

ROOT = Path(__file__).resolve().parents[3]
# views, allocations and queries: nothing runs on the device
# fmt: off
FREE = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand", "squeeze",
    "unsqueeze", "unbind", "select", "slice", "narrow", "split", "split_with_sizes", "unsafe_split", "chunk",
    "unfold", "diagonal", "as_strided", "alias", "detach", "detach_", "view_as_real", "lift_fresh", "empty",
    "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_", "sym_size", "sym_numel",
    "sym_stride", "is_same_size", "device", "wait_tensor", "record_stream", "_local_scalar_dense",
}
# fmt: on
# operations that start more or fewer than one kernel
KERNELS = {
    "_scaled_dot_product_flash_attention_backward": 3,
    "_flash_attention_backward": 3,
    "_varlen_attn_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "_efficient_attention_backward": 2,
    "nonzero": 3,
}
COPIES = ("_to_copy", "copy_", "_copy_from")
BATCH, FORWARD, BACKWARD, UPDATE = PHASES = "batch", "forward", "backward", "update"


@dataclass
class Phase:
    """Counts of one part of a step."""

    ops: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    """Triton kernels by name"""
    hooked: int = 0
    """The part of `ops` made by gradient hooks of DeepSpeed or of our engine"""
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kind and source location"""

    @property
    def launches(self) -> int:
        return sum(self.kernels.values()) + sum(count * KERNELS.get(name, 1) for name, count in self.ops.items())

    @property
    def operations(self) -> int:
        return sum(self.ops.values()) + sum(self.kernels.values())


class Count(TorchDispatchMode):
    """Counts while active; enter it inside `device.fake_tensors()`. `phase` assigns the following operations."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = BATCH
        self.phases = {name: Phase() for name in PHASES}
        self.attention: Counter[str] = Counter()
        """Calls by the key of their plan"""
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._lock = threading.Lock()
        self._listening = (
            (launches.LISTENERS, self._launched),
            (device.LISTENERS, self._waited),
        )

    def __enter__(self) -> "Count":
        for listeners, listener in self._listening:
            listeners.append(listener)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for listeners, listener in self._listening:
            listeners.remove(listener)

    @property
    def now(self) -> Phase:
        return self.phases[self.phase]

    def clear(self) -> None:
        """Start a new step."""
        self.phase = BATCH
        self.phases = {name: Phase() for name in PHASES}
        self.attention.clear()

    def held_bytes(self) -> int:
        """Bytes of all tensors on the device that were made since the count began and are still referenced."""
        with self._lock:
            self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
            return sum(nbytes for _, nbytes in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name == "_local_scalar_dense":
            return self._value(func, args, tensors)
        on_device = any(tensor.device.type == "cuda" for tensor in tensors) or _device_of(kwargs) == "cuda"
        if not on_device:
            return func(*args, **kwargs)
        if name == "nonzero":
            self._waited("nonzero")
            self._ran(name)
            return _all_of(args[0])
        if name in ("index", "index_put_", "index_put") and any(_is_mask(index) for index in args[1]):
            self._waited(f"{name} with a mask")
            self._ran("nonzero")
            args = (args[0], _without_masks(args[1]), *args[2:])
        if name in ("equal", "is_nonzero"):
            self._waited(name)
            self._ran(name)
            return name == "equal"
        if name in COPIES and _crosses(name, args, kwargs, tensors):
            self._waited(_crosses(name, args, kwargs, tensors))
        if name in attention.FORWARD:
            self.attention[attention.shape_of(name, args, kwargs)] += 1
        if name == "_efficient_attention_backward":
            result = attention.efficient_backward(args)
        else:
            result = func(*args, **kwargs)
        if name not in FREE:
            self._ran(name)
        self._remember(result)
        return result

    def _value(self, func: Any, args: Any, tensors: list[torch.Tensor]) -> Any:
        if tensors[0].device.type == "cuda":
            self._waited("value read")
        else:
            try:
                return func(*args)
            except DataDependentOutputException:
                pass  # the value came from the device: a loss or a norm
        kind = tensors[0].dtype
        return False if kind == torch.bool else 0.0 if kind.is_floating_point else 0

    def _ran(self, name: str) -> None:
        self.now.ops[name] += 1
        if self.phase == BACKWARD and _hooked():
            self.now.hooked += 1

    def _remember(self, result: Any) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda":
                storage = leaf.untyped_storage()
                with self._lock:
                    if storage._cdata not in self._storages:
                        self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def _launched(self, kernel: str) -> None:
        self.now.kernels[kernel] += 1

    def _waited(self, kind: str) -> None:
        self.now.waits[kind, _place()] += 1


def _device_of(kwargs: dict[str, Any]) -> str:
    return getattr(kwargs.get("device"), "type", "")


def _crosses(name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> str:
    """The name of a copy between host and device that blocks the host; empty for any other copy."""
    if name == "_to_copy":
        source, target = args[0].device.type, _device_of(kwargs) or args[0].device.type
        waits = not kwargs.get("non_blocking", False)
    else:
        target, source = args[0].device.type, args[1].device.type
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if {source, target} != {"cpu", "cuda"} or not waits:
        return ""
    return "copy to the host" if target == "cpu" else "copy to the device"


def _all_of(tensor: torch.Tensor) -> torch.Tensor:
    """As if every element were true: the maximum."""
    return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.int64)


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _without_masks(indices: Any) -> list[Any]:
    return [part for index in indices for part in (_all_of(index).unbind(1) if _is_mask(index) else (index,))]


def _frames() -> Any:
    frame: Any = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _hooked() -> bool:
    """Whether a gradient hook is running: a function of DeepSpeed or of our engine is above autograd on the stack."""
    for frame in _frames():
        name = frame.f_code.co_filename
        if name.endswith(("torch/autograd/graph.py", "torch/_tensor.py", "torch/autograd/__init__.py")):
            return False
        if "/deepspeed/" in name or "/ft_dist/engine/" in name or "/ft_dist/optim/" in name:
            return True
    return False


def _place(depth: int = 3) -> str:
    """The innermost lines outside torch and this folder, innermost first."""
    lines = []
    for frame in _frames():
        file = Path(frame.f_code.co_filename)
        if "/torch/" in str(file) or "/gpu_fake/" in str(file) or file.name.startswith("<"):
            continue
        parts = file.parts
        known = next(
            (
                parts.index(top)
                for top in ("ft_dist", "ft_dist_kernels", "deepspeed", "peft", "transformers")
                if top in parts
            ),
            len(parts) - 1,
        )
        lines.append(f"{'/'.join(parts[known:])}:{frame.f_lineno}")
        if len(lines) == depth:
            break
    return " <- ".join(lines)
