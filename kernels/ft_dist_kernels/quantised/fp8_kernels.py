"""The Triton quantiser of `fp8`: one program per token, whose row stays in registers between its two uses.

Traffic for T rows of K in bf16: 2 T K read, T K codes and 4 T of scales written; bound by memory. Up to three tensors
are concatenated in the codes and share the row's scale.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself; only constants have one.

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.quantised.fp8_format import LARGEST, LEAST_MAXIMUM

_ELEMENTS_A_THREAD = 32
# PyTorch's row-wise kernel (CUDA before 12.9) may read scales up to a tile's end: pytorch/pytorch#133334
_SCALE_TILE = 256


@triton.jit
def _largest_bits(x_K):
    # the bits of non-negative floats have the same order as their values, and NaN follows infinity
    return tl.max(x_K.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)


@triton.jit
def _store_codes(codes, x_K, inverse, inside):
    tl.store(codes, (x_K.to(tl.float32) * inverse).to(tl.float8e4nv), mask=inside)


@triton.jit
def _quantize_kernel(
    a,
    b,
    c,
    codes,
    scales,
    width_a,
    width_b,
    width_c,
    stride_a,
    stride_b,
    stride_c,
    LARGEST: tl.constexpr,
    LEAST_MAXIMUM: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at_a = tl.arange(0, BLOCK_A)
    a_K = tl.load(a + row * stride_a + at_a, mask=at_a < width_a, other=0.0)
    bits = _largest_bits(a_K)
    if BLOCK_B > 0:
        at_b = tl.arange(0, BLOCK_B)
        b_K = tl.load(b + row * stride_b + at_b, mask=at_b < width_b, other=0.0)
        bits = tl.maximum(bits, _largest_bits(b_K))
    if BLOCK_C > 0:
        at_c = tl.arange(0, BLOCK_C)
        c_K = tl.load(c + row * stride_c + at_c, mask=at_c < width_c, other=0.0)
        bits = tl.maximum(bits, _largest_bits(c_K))
    finite = bits < 0x7F800000
    largest = tl.maximum(bits.to(tl.float32, bitcast=True), LEAST_MAXIMUM)
    inverse = LARGEST / largest
    tl.store(scales + row, tl.where(finite, largest / LARGEST, float("nan")))
    codes += row * (width_a + width_b + width_c)
    _store_codes(codes + at_a, a_K, inverse, at_a < width_a)
    if BLOCK_B > 0:
        _store_codes(codes + width_a + at_b, b_K, inverse, at_b < width_b)
    if BLOCK_C > 0:
        _store_codes(codes + width_a + width_b + at_c, c_K, inverse, at_c < width_c)


def _warps(blocks: Sequence[int]) -> int:
    threads = triton.next_power_of_2(sum(blocks)) // _ELEMENTS_A_THREAD
    return max(4, min(32, threads // 32))


def quantize(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See `fp8.quantize_rows`; at least one row."""
    rows = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    tokens, widths = rows[0].shape[0], [part.shape[1] for part in rows]
    codes_TK = torch.empty(tokens, sum(widths), dtype=torch.float8_e4m3fn, device=rows[0].device)
    scale_T = rows[0].new_empty(triton.cdiv(tokens, _SCALE_TILE) * _SCALE_TILE, dtype=torch.float32)[:tokens]
    absent = 3 - len(rows)
    blocks = [*(triton.next_power_of_2(width) for width in widths), *[0] * absent]
    _quantize_kernel[(tokens,)](
        *rows,
        *[rows[0]] * absent,
        codes_TK,
        scale_T,
        *widths,
        *[0] * absent,
        *(part.stride(0) for part in rows),
        *[0] * absent,
        LARGEST,
        LEAST_MAXIMUM,
        *blocks,
        num_warps=_warps(blocks),
    )
    return codes_TK, scale_T


def aot_cases(chip: Chip) -> list[AotCase]:
    if chip in ("sm_80", "gfx942"):
        return []  # no e4m3 of this kind
    pointers = ("a", "b", "c", "codes", "scales")
    widths = ("width_a", "width_b", "width_c")
    strides = ("stride_a", "stride_b", "stride_c")
    signature = {
        **dict.fromkeys(pointers[:3], "*bf16"),
        "codes": "*fp8e4nv",
        "scales": "*fp32",
        **dict.fromkeys((*widths, *strides), "i32"),
        **dict.fromkeys(("LARGEST", "LEAST_MAXIMUM", "BLOCK_A", "BLOCK_B", "BLOCK_C"), "constexpr"),
    }
    shapes = {
        "one row of 4096": (4096, 0, 0),
        "q, k, v of an 8B model": (4096, 1024, 1024),
        "gate, up of an 8B model": (16384, 16384, 0),
        "down of a 70B model": (32768, 0, 0),
    }
    return [
        AotCase(
            name=f"quantize {name}",
            kernel=_quantize_kernel,
            signature=signature,
            constexprs={"LARGEST": LARGEST, "LEAST_MAXIMUM": LEAST_MAXIMUM}
            | dict(zip(("BLOCK_A", "BLOCK_B", "BLOCK_C"), blocks, strict=True)),
            divisible=(*pointers, *widths, *strides),
            options={"num_warps": _warps(blocks)},
        )
        for name, blocks in shapes.items()
    ]
