"""What this machine has and what the run uses of it: peak memory, peak arithmetic rate, versions."""

import gc
import importlib.metadata
import platform
import re
import resource
import sys
from pathlib import Path

import torch

# Dense bf16 peak of one chip in FLOP/s, from the vendors' data sheets. MFU is told only for chips named here.
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
    """Collect garbage again, but not among what exists: called once most libraries are loaded and before data is
    prepared, which may take long and must not keep its garbage."""
    gc.freeze()
    gc.enable()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that was in use at once: allocated on a GPU, resident on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        # ru_maxrss would begin with what the process had that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device`, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for chip, flops in PEAK_BF16_FLOPS.items() if chip in name), None)


def flops_per_token(*, total_parameters: int, trainable_share: float) -> float:
    """Arithmetic of forward and backward for a token, attention left out.

    2N forward, 2N for the gradient of the activations, and 2N times the trained share for the gradient of the weights:
    6N for full fine-tuning, 4N for LoRA.
    """
    return total_parameters * (4.0 + 2.0 * trainable_share)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
