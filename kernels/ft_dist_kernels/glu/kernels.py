"""SwiGLU and GEGLU in Triton. Shapes and formulas: op.py.

One tile per program; every byte is read once and written once (forward 3 T I itemsize, backward 5 T I).
"""

# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.chips import chip_of

# (elements of a tile, warps): two 16-byte loads of bf16 per thread and tensor.
TILES: dict[Chip, tuple[int, int]] = {
    "sm_80": (2048, 4),
    "sm_90": (2048, 4),
    "sm_100": (2048, 4),
    "gfx942": (2048, 4),
}


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and 1 - sigmoid(x), without cancellation or overflow."""
    e = tl.exp(-tl.abs(x))
    near, far = 1.0 / (1.0 + e), e / (1.0 + e)
    return tl.where(x < 0, far, near), tl.where(x < 0, near, far)


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)) in fp32."""
    if ACTIVATION == "silu":
        sigmoid, rest = _sigmoids(g)
        value = g * sigmoid
        slope = sigmoid * (1.0 + g * rest)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u) with u = sqrt(2 / pi) (g + 0.044715 g^3)
        half, rest = _sigmoids(1.5957691216057308 * (g + 0.044715 * g * g * g))
        value = g * half
        slope = half * (1.0 + g * rest * 1.5957691216057308 * (1.0 + 0.134145 * g * g))
    else:
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * cdf
        slope = cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    return value, slope


@triton.jit
def forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_stride,
    up_stride,
    y_stride,
    rows,
    width,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    inside = (row < rows) & (column < width)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, _slope = _activate(gate, ACTIVATION)
    tl.store(y_ptr + row * y_stride + column, (value * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    gate_ptr,
    up_ptr,
    dy_ptr,
    dgate_ptr,
    dup_ptr,
    gate_stride,
    up_stride,
    dy_stride,
    dgate_stride,
    dup_stride,
    rows,
    width,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    inside = (row < rows) & (column < width)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(gate, ACTIVATION)
    dtype = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + row * dgate_stride + column, (dy * up * slope).to(dtype), mask=inside)
    tl.store(dup_ptr + row * dup_stride + column, (dy * value).to(dtype), mask=inside)


def _tile(width: int, chip: Chip) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile."""
    elements, warps = TILES[chip]
    block = min(elements, triton.next_power_of_2(width))
    return elements // block, block, warps


def forward_triton(gate_TI: Tensor, up_TI: Tensor, y_TI: Tensor, activation: str) -> None:
    """Same contract as `forward_torch`."""
    rows, width = gate_TI.shape
    if gate_TI.numel() == 0:
        return
    tile_rows, block, warps = _tile(width, chip_of(gate_TI.device))
    forward_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(width, block))](
        gate_TI, up_TI, y_TI, gate_TI.stride(0), up_TI.stride(0), y_TI.stride(0), rows, width,
        ACTIVATION=activation, ROWS=tile_rows, BLOCK_I=block, num_warps=warps,
    )  # fmt: skip


def backward_triton(
    gate_TI: Tensor,
    up_TI: Tensor,
    dy_TI: Tensor,
    dgate_TI: Tensor,
    dup_TI: Tensor,
    activation: str,
) -> None:
    """Same contract as `backward_torch`."""
    rows, width = gate_TI.shape
    if gate_TI.numel() == 0:
        return
    tile_rows, block, warps = _tile(width, chip_of(gate_TI.device))
    strides = [tensor.stride(0) for tensor in (gate_TI, up_TI, dy_TI, dgate_TI, dup_TI)]
    backward_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(width, block))](
        gate_TI, up_TI, dy_TI, dgate_TI, dup_TI, *strides, rows, width,
        ACTIVATION=activation, ROWS=tile_rows, BLOCK_I=block, num_warps=warps,
    )  # fmt: skip


def aot_cases(chip: Chip) -> list[AotCase]:
    """Both directions of every activation at the widths of real models, bf16."""
    cases = []
    for activation, width in (("silu", 14336), ("gelu_tanh", 10240), ("gelu", 10240), ("silu", 1536)):
        tile_rows, block, warps = _tile(width, chip)
        constexprs = {"ACTIVATION": activation, "ROWS": tile_rows, "BLOCK_I": block}
        for name, kernel, tensors in (
            ("forward", forward_kernel, ("gate", "up", "y")),
            ("backward", backward_kernel, ("gate", "up", "dy", "dgate", "dup")),
        ):
            pointers = [f"{tensor}_ptr" for tensor in tensors]
            strides = [f"{tensor}_stride" for tensor in tensors]
            signature = dict.fromkeys(pointers, "*bf16") | dict.fromkeys((*strides, "rows", "width"), "i32")
            cases.append(
                AotCase(
                    name=f"glu/{activation}-{name}-{width}",
                    kernel=kernel,
                    signature=signature | dict.fromkeys(constexprs, "constexpr"),
                    constexprs=constexprs,
                    divisible=(*pointers, *strides, "width"),
                    options={"num_warps": warps},
                )
            )
    return cases
