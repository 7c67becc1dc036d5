"""The chip whose tuned settings a tensor's kernels use."""

from functools import lru_cache

import torch

from ft_dist_kernels.aot import Chip


def chip_of(device: torch.device) -> Chip:
    """The tuned chip nearest to the device's; Hopper's for the interpreter on CPU."""
    return _gpu(device)[0] if device.type == "cuda" else "sm_90"


def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; 1 for the interpreter."""
    return _gpu(device)[1] if device.type == "cuda" else 1


@lru_cache(maxsize=64)
def _gpu(device: torch.device) -> tuple[Chip, int]:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return "gfx942", properties.multi_processor_count
    # consumer Blackwell (12) has as much shared memory as consumer Ampere, less than half of the data centre chips'
    nearest: dict[int, Chip] = {9: "sm_90", 10: "sm_100", 11: "sm_100"}
    return nearest.get(properties.major, "sm_80"), properties.multi_processor_count
