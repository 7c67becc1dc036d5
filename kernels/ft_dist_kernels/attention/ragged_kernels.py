"""Sums over the places of shared tokens in Triton (see `ragged.py`).

Each program handles one token and a block of its columns. It reads the token's places in order, so the sums are
deterministic; every byte is read once and written once.
"""

# mypy: disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip

BLOCK = 1024


@triton.jit
def sum_places_kernel(x_ptr, places_ptr, ends_ptr, y_ptr, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    at = tl.load(ends_ptr + token)
    end = tl.load(ends_ptr + token + 1)
    while at < end:
        place = tl.load(places_ptr + at).to(tl.int64)
        total += tl.load(x_ptr + place * width + column, mask=inside, other=0.0).to(tl.float32)
        at += 1
    tl.store(y_ptr + token * width + column, total.to(y_ptr.dtype.element_ty), mask=inside)


def launch_sum_places(x_KMD: Tensor, places: Tensor, place_ends: Tensor) -> Tensor:
    x_KMD = x_KMD.contiguous()
    tokens, width = len(place_ends) - 1, x_KMD.shape[1] * x_KMD.shape[2]
    y_TMD = torch.empty(tokens, *x_KMD.shape[1:], dtype=x_KMD.dtype, device=x_KMD.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    sum_places_kernel[(tokens, triton.cdiv(width, block))](x_KMD, places, place_ends, y_TMD, width, BLOCK=block)
    return y_TMD


def aot_cases(chip: Chip) -> list[AotCase]:
    signature = {
        "x_ptr": "*bf16",
        "places_ptr": "*i32",
        "ends_ptr": "*i32",
        "y_ptr": "*bf16",
        "width": "i32",
        "BLOCK": "constexpr",
    }
    divisible = tuple(name for name in signature if name != "BLOCK")
    return [AotCase("sum_places", sum_places_kernel, signature, {"BLOCK": BLOCK}, divisible)]
