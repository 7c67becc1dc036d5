"""Which form of an op runs: the Triton kernels or the chunked PyTorch form.

`auto` selects Triton for CUDA/HIP tensors and PyTorch otherwise. `triton` on CPU tensors is only possible under
Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported), which tests parity without a GPU.
"""

import os
from importlib.util import find_spec
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch"]

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: torch.Tensor, backend: Backend) -> bool:
    """True if the Triton kernels should process `tensor`.

    Raises ValueError for an unknown backend, or for `triton` if it cannot run.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend={backend!r} is not one of auto, triton, torch")
    if backend == "torch":
        return False
    if backend == "auto":
        return HAS_TRITON and tensor.is_cuda
    if not HAS_TRITON:
        raise ValueError("backend='triton' needs the triton package (pip install triton)")
    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(f"backend='triton' on a {tensor.device.type} tensor needs TRITON_INTERPRET=1")
    return True
