"""Peak memory of this process, peak arithmetic rate of the device, versions of libraries."""

import gc
import importlib.metadata
import platform
import re
import resource
import sys
from pathlib import Path

import torch

# Dense bf16 peak of one chip in FLOP/s, from the vendors' data sheets. MFU is reported only for these chips.
PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "triton", "datasets", "safetensors")


def resume_gc() -> None:
    """Enable garbage collection, but exempt all existing objects. Called once most libraries are loaded, before data is
    prepared, which may take long and must not accumulate garbage."""
    gc.freeze()
    gc.enable()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in use: allocated on a GPU, resident on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        # ru_maxrss would start from the memory of the parent process
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device` in FLOP/s, or None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for chip, flops in PEAK_BF16_FLOPS.items() if chip in name), None)


def flops_per_token(*, total_parameters: int, trainable_share: float) -> float:
    """FLOPs per token of forward and backward, without attention.

    2N forward, 2N for the gradients of the activations, and 2N times the trainable share for those of the weights:
    6N for full fine-tuning, 4N for LoRA.
    """
    return total_parameters * (4.0 + 2.0 * trainable_share)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
