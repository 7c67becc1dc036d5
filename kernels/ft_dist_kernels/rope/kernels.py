"""RoPE in Triton. Shapes and formulas: op.py.

Each program handles one position with all its query and key heads: the tables are read once for all of them, every
other byte is read once and written once (2 B S (N + N_kv) D itemsize in each direction).
"""

# mypy: disallow-incomplete-defs=False

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.chips import chip_of

# (heads times columns of a half in registers, warps)
TILES: dict[Chip, tuple[int, int]] = {
    "sm_80": (2048, 4),
    "sm_90": (2048, 4),
    "sm_100": (2048, 4),
    "gfx942": (2048, 4),
}


@triton.jit
def _rotate_heads(
    x_ptr,
    y_ptr,
    x_head_stride,
    y_head_stride,
    heads,
    c1,
    c2,
    s1,
    s2,
    HALF: tl.constexpr,
    PASS: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
):
    column = tl.arange(0, BLOCK_HALF)[None, :]
    dtype = y_ptr.dtype.element_ty
    for first in range(0, heads, HEADS):
        head = (first + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        inside = (head < heads) & (column < HALF)
        x1 = tl.load(x_ptr + head * x_head_stride + column, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + head * x_head_stride + HALF + column, mask=inside, other=0.0).to(tl.float32)
        if INVERSE:
            y1 = x1 * c1 + x2 * s2
            y2 = x2 * c2 - x1 * s1
        else:
            y1 = x1 * c1 - x2 * s1
            y2 = x2 * c2 + x1 * s2
        tl.store(y_ptr + head * y_head_stride + column, y1.to(dtype), mask=inside)
        tl.store(y_ptr + head * y_head_stride + HALF + column, y2.to(dtype), mask=inside)
        if PASS > 0:
            rest = tl.arange(0, BLOCK_PASS)[None, :]
            kept = (head < heads) & (rest < PASS)
            passing = tl.load(x_ptr + head * x_head_stride + 2 * HALF + rest, mask=kept, other=0.0)
            tl.store(y_ptr + head * y_head_stride + 2 * HALF + rest, passing, mask=kept)


@triton.jit
def _copy_heads(
    x_ptr, y_ptr, x_head_stride, y_head_stride, heads, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.arange(0, BLOCK)[None, :]
    for first in range(0, heads, HEADS):
        head = (first + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        inside = (head < heads) & (column < WIDTH)
        tl.store(
            y_ptr + head * y_head_stride + column,
            tl.load(x_ptr + head * x_head_stride + column, mask=inside, other=0.0),
            mask=inside,
        )


@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    q_batch_stride,
    q_head_stride,
    q_position_stride,
    k_batch_stride,
    k_head_stride,
    k_position_stride,
    v_batch_stride,
    v_head_stride,
    v_position_stride,
    q_out_batch_stride,
    q_out_head_stride,
    q_out_position_stride,
    k_out_batch_stride,
    k_out_head_stride,
    k_out_position_stride,
    v_out_batch_stride,
    v_out_head_stride,
    v_out_position_stride,
    cos_batch_stride,
    cos_position_stride,
    sin_batch_stride,
    sin_position_stride,
    q_heads,
    k_heads,
    HALF: tl.constexpr,
    PASS: tl.constexpr,
    INVERSE: tl.constexpr,
    COPY_V: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    within = column < HALF
    cos_ptr += batch * cos_batch_stride + position * cos_position_stride
    sin_ptr += batch * sin_batch_stride + position * sin_position_stride
    c1 = tl.load(cos_ptr + column, mask=within, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + HALF + column, mask=within, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + column, mask=within, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + HALF + column, mask=within, other=0.0).to(tl.float32)
    _rotate_heads(
        q_ptr + batch * q_batch_stride + position * q_position_stride,
        q_out_ptr + batch * q_out_batch_stride + position * q_out_position_stride,
        q_head_stride,
        q_out_head_stride,
        q_heads,
        c1,
        c2,
        s1,
        s2,
        HALF,
        PASS,
        INVERSE,
        Q_HEADS,
        BLOCK_HALF,
        BLOCK_PASS,
    )
    _rotate_heads(
        k_ptr + batch * k_batch_stride + position * k_position_stride,
        k_out_ptr + batch * k_out_batch_stride + position * k_out_position_stride,
        k_head_stride,
        k_out_head_stride,
        k_heads,
        c1,
        c2,
        s1,
        s2,
        HALF,
        PASS,
        INVERSE,
        K_HEADS,
        BLOCK_HALF,
        BLOCK_PASS,
    )
    if COPY_V:
        _copy_heads(
            v_ptr + batch * v_batch_stride + position * v_position_stride,
            v_out_ptr + batch * v_out_batch_stride + position * v_out_position_stride,
            v_head_stride,
            v_out_head_stride,
            k_heads,
            2 * HALF + PASS,
            V_HEADS,
            BLOCK_V,
        )


def _configuration(q_heads: int, k_heads: int, width: int, rotated: int, chip: Chip) -> tuple[dict[str, int], int]:
    """(constexprs, warps)"""
    elements, warps = TILES[chip]
    block_half = triton.next_power_of_2(rotated // 2)
    block_pass = triton.next_power_of_2(max(width - rotated, 1))
    block_v = triton.next_power_of_2(width)
    most = max(1, elements // max(block_half, block_pass))
    return {
        "HALF": rotated // 2,
        "PASS": width - rotated,
        "Q_HEADS": min(most, triton.next_power_of_2(q_heads)),
        "K_HEADS": min(most, triton.next_power_of_2(k_heads)),
        "V_HEADS": min(max(1, elements // block_v), triton.next_power_of_2(k_heads)),
        "BLOCK_HALF": block_half,
        "BLOCK_PASS": block_pass,
        "BLOCK_V": block_v,
    }, warps


def _dense_columns(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def rotate_triton(parts: Sequence[Tensor], cos: Tensor, sin: Tensor, outputs: Sequence[Tensor], inverse: bool) -> None:
    """Fills `outputs` with q and k of `parts` rotated by the tables, or back, and with v if that is the third."""
    q, k, *rest = (_dense_columns(part) for part in parts)
    q_out, k_out, *rest_out = outputs
    batch, q_heads, positions, width = q.shape
    k_heads, rotated = k.shape[1], cos.shape[2]
    if batch * positions == 0:
        return
    cos, sin = (_dense_columns(table) for table in (cos, sin))
    constexprs, warps = _configuration(q_heads, k_heads, width, rotated, chip_of(q.device))
    v, v_out = (rest[0], rest_out[0]) if rest else (k, k_out)
    tables = [
        stride
        for table in (cos, sin)
        for stride in (table.stride(0) if table.shape[0] > 1 else 0, table.stride(1))
    ]  # fmt: skip
    rope_kernel[(positions, batch)](
        q, k, v, cos, sin, q_out, k_out, v_out,
        *(stride for tensor in (q, k, v, q_out, k_out, v_out) for stride in tensor.stride()[:3]), *tables,
        q_heads, k_heads, INVERSE=inverse, COPY_V=bool(rest), num_warps=warps, **constexprs,
    )  # fmt: skip


def aot_cases(chip: Chip) -> list[AotCase]:
    """Both directions for the heads of real models, bf16."""
    cases = []
    for name, q_heads, k_heads, width, rotated in (
        ("llama3-8b", 32, 8, 128, 128),
        ("gemma3-4b", 8, 4, 256, 256),
        ("partial", 24, 8, 128, 96),
        ("llama3-70b", 64, 8, 128, 128),
    ):
        for inverse, merged in ((False, False), (True, False), (False, True), (True, True)):
            constexprs, warps = _configuration(q_heads, k_heads, width, rotated, chip)
            pointers = [f"{tensor}_ptr" for tensor in ("q", "k", "v", "cos", "sin", "q_out", "k_out", "v_out")]
            strides = [
                f"{tensor}_{axis}_stride"
                for tensor in ("q", "k", "v", "q_out", "k_out", "v_out")
                for axis in ("batch", "head", "position")
            ] + [f"{table}_{axis}_stride" for table in ("cos", "sin") for axis in ("batch", "position")]
            signature = dict.fromkeys(pointers, "*bf16") | dict.fromkeys((*strides, "q_heads", "k_heads"), "i32")
            values = {"HALF": 0, "PASS": 0, "INVERSE": inverse, "COPY_V": merged} | constexprs
            cases.append(
                AotCase(
                    name=f"rope/{name}-{'backward' if inverse else 'forward'}{'-merged' if merged else ''}",
                    kernel=rope_kernel,
                    signature=signature | dict.fromkeys(values, "constexpr"),
                    constexprs=values,
                    divisible=(*pointers, *strides),
                    options={"num_warps": warps},
                )
            )
    return cases
