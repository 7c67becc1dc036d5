"""Compiles Triton kernels for the chip with the arguments of a launch, without running them.

The compiler sees an argument's type, its alignment and whether it is 1, so the arguments here are the
real ones; of a tensor it sees the dtype and the offset of its first element.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.gpu_fake.simulator import device

LISTENERS: list[Callable[[str], None]] = []
"""Each is called with the kernel's name at every launch"""


class LaunchError(AssertionError):
    """A launch that the chip would refuse. The message names kernel, value and limit."""


@dataclass
class Compiled:
    """One compiled form of a kernel. `seconds` includes reading it from the cache."""

    kernel: str
    shared_bytes: int
    seconds: float


COMPILED: dict[str, Compiled] = {}
"""By hash of the compiled kernel"""


class _Pointer:
    """A tensor as Triton's launcher sees it. The allocator aligns memory to 512 bytes."""

    def __init__(self, tensor: Any) -> None:
        self.dtype = tensor.dtype
        self._address = (1 << 20) + tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


class _Driver:
    """The driver interface that Triton queries before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def set_current_device(self, _: int) -> None: ...

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cuda")

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * device.CAPABILITY[0] + device.CAPABILITY[1], 32)


def compile_only() -> None:
    """From here on, a launch compiles, checks and calls the listeners."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_Driver())
    original = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        name = kernel.__name__
        given = [_seen(name, argument) for argument in args]
        named = {key: _seen(name, argument) for key, argument in kwargs.items()}
        started = time.perf_counter()
        compiled = original(kernel, *given, grid=grid, warmup=True, **named)
        seconds = time.perf_counter() - started
        _check_grid(name, grid, dict(zip(kernel.arg_names, args, strict=False)) | kwargs)
        _keep(name, compiled, seconds)
        if not warmup:
            for listener in LISTENERS:
                listener(name)
        return compiled

    JITFunction.run = run


def _seen(kernel: str, argument: Any) -> Any:
    import torch

    if not isinstance(argument, torch.Tensor):
        return argument
    if argument.device.type != "cuda":
        raise LaunchError(f"{kernel}: an argument of shape {tuple(argument.shape)} is on {argument.device}, not cuda")
    return _Pointer(argument)


def _check_grid(kernel: str, grid: Any, arguments: dict[str, Any]) -> None:
    sizes = tuple(grid(arguments) if callable(grid) else grid)
    for axis, size, limit in zip("xyz", sizes, device.GRID, strict=False):
        if not 0 < size <= limit:
            raise LaunchError(f"{kernel}: grid {sizes} has {axis}={size}, which must be in 1..{limit}")


def _keep(kernel: str, compiled: Any, seconds: float) -> None:
    shared = compiled.metadata.shared
    if shared > device.SHARED_MEMORY_BYTES:
        limit = device.SHARED_MEMORY_BYTES
        raise LaunchError(f"{kernel}: {shared} bytes of shared memory; a block of this chip has {limit}")
    COMPILED.setdefault(compiled.hash, Compiled(kernel, shared, seconds))
