"""Peak memory of this process and errors of memory, FLOPs per token, versions of libraries."""

import contextlib
import gc
import importlib.metadata
import platform
import re
import resource
import sys
from functools import cache
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "triton",
    "datasets",
    "safetensors",
    # kernels that transformers uses where it finds them
    "flash-attn",
    "flash-linear-attention",
    "causal-conv1d",
    "mamba-ssm",
    "kernels",
)


def resume_gc() -> None:
    """Enable garbage collection, but exempt all existing objects. Called once most libraries are loaded, before data is
    prepared, which may take long and must not accumulate garbage."""
    gc.freeze()
    gc.enable()


def is_out_of_memory(error: BaseException) -> bool:
    """torch has its own error on GPUs; on CPU, its allocator and oneDNN raise a RuntimeError, Python a MemoryError."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    texts = ("can't allocate memory", "out of memory", "could not create a primitive")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in use: allocated on a GPU, resident on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        # ru_maxrss would start from the memory of the parent process
        with contextlib.suppress(OSError):  # no descriptor is left
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
            found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
            if found:
                return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def flops_per_token(*, total_parameters: int, trainable_share: float) -> float:
    """FLOPs per token of forward and backward, without attention.

    2N forward, 2N for the gradients of the activations, and 2N times the trainable share for those of the weights:
    6N for full fine-tuning, 4N for LoRA.
    """
    return total_parameters * (4.0 + 2.0 * trainable_share)


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
