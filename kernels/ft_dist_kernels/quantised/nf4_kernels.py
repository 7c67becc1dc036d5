"""The Triton form of `nf4`: one program widens a run of whole blocks.

Traffic for N elements in bf16: N / 2 bytes of codes, N / 64 of absmax, 2 N written; bound by memory.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself; only constants have one.

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip

if TYPE_CHECKING:
    from ft_dist_kernels.quantised.nf4_format import NF4Weight

_BLOCKS = 64  # blocks of 64 elements per program: 4096 elements


@triton.jit
def _dequantize_kernel(
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    code,
    nested_code,
    out,
    count,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block * 64 < count
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        nested = tl.load(nested_absmax + block // 256, mask=inside, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested + tl.load(nested_offset)
    pair = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    byte = tl.load(packed + pair, mask=pair * 2 < count, other=0).to(tl.int32)
    high = tl.load(code + (byte >> 4)) * scale[:, None]
    low = tl.load(code + (byte & 15)) * scale[:, None]
    values = tl.interleave(high, low)
    at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=at < count)


def dequantize(weight: "NF4Weight", dtype: torch.dtype, code: Tensor, nested_code: Tensor) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    nested = weight.nested_absmax is not None
    _dequantize_kernel[(triton.cdiv(out.numel(), 64 * _BLOCKS),)](
        weight.packed,
        weight.absmax,
        weight.nested_absmax if nested else weight.absmax,
        weight.nested_offset if nested else weight.absmax,
        code,
        nested_code,
        out,
        out.numel(),
        NESTED=nested,
        BLOCKS=_BLOCKS,
        num_warps=4,
    )
    return out


def aot_cases(chip: Chip) -> list[AotCase]:
    signature = {
        "packed": "*u8",
        "absmax": "*u8",
        "nested_absmax": "*fp32",
        "nested_offset": "*fp32",
        "code": "*fp32",
        "nested_code": "*fp32",
        "out": "*bf16",
        "count": "i32",
        "NESTED": "constexpr",
        "BLOCKS": "constexpr",
    }
    pointers = tuple(name for name in signature if signature[name].startswith("*"))
    return [
        AotCase(
            name=f"dequantize {'double' if nested else 'single'} quantisation",
            kernel=_dequantize_kernel,
            signature=signature if nested else {**signature, "absmax": "*fp32"},
            constexprs={"NESTED": nested, "BLOCKS": _BLOCKS},
            divisible=(*pointers, "count"),
            options={"num_warps": 4},
        )
        for nested in (True, False)
    ]
