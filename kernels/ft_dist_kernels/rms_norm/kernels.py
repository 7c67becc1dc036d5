"""RMSNorm in Triton. Shapes and formulas: op.py.

Up to `WHOLE_WIDTH` columns a program holds whole rows in registers: every byte is read once and written once (forward 2
T H itemsize, backward 3 T H). Wider rows would spill, so they are processed in column blocks twice, the second time
from L2, and a separate kernel computes dweight down each column block.
"""

# mypy: disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.chips import chip_of, processors_of

WHOLE_WIDTH = 8192
TILE_ELEMENTS = 2048
LOOPED_BLOCK = 4096
COLUMN_TILE = (16, 256)
# (fp32 values of one tile per thread, threads per warp)
THREADS: dict[Chip, tuple[int, int]] = {
    "sm_80": (16, 32),
    "sm_90": (16, 32),
    "sm_100": (16, 32),
    "gfx942": (16, 64),
}
PROGRAMS_A_PROCESSOR = 4


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    y_stride,
    rows,
    width,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_H)[None, :]
    dtype = y_ptr.dtype.element_ty
    squares = tl.zeros((ROWS, BLOCK_H), tl.float32)
    s = squares
    for start in range(0, width, BLOCK_H):
        inside = (row < rows) & (start + column < width)
        s = tl.load(x_ptr + row * x_stride + start + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            s += tl.load(residual_ptr + row * residual_stride + start + column, mask=inside, other=0.0).to(tl.float32)
            s = s.to(dtype)
            tl.store(sum_ptr + row * width + start + column, s, mask=inside)
            s = s.to(tl.float32)
        squares += s * s
    rstd = 1.0 / tl.sqrt(tl.sum(squares, 1)[:, None] / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    for start in range(0, width, BLOCK_H):
        inside = (row < rows) & (start + column < width)
        if not WHOLE:
            s = tl.load(x_ptr + row * x_stride + start + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                s += tl.load(residual_ptr + row * residual_stride + start + column, mask=inside, other=0.0).to(
                    tl.float32
                )
                s = s.to(dtype).to(tl.float32)
        scale = tl.load(weight_ptr + start + column, mask=start + column < width, other=0.0).to(tl.float32) + offset
        normed = s * rstd
        if CAST_FIRST:
            normed = normed.to(dtype).to(tl.float32)
        tl.store(y_ptr + row * y_stride + start + column, (normed * scale).to(dtype), mask=inside)


@triton.jit
def backward_kernel(
    sum_ptr,
    rstd_ptr,
    weight_ptr,
    dy_ptr,
    dsum_ptr,
    dx_ptr,
    partial_ptr,
    sum_stride,
    dy_stride,
    dsum_stride,
    rows,
    width,
    rows_a_program,
    offset,
    HAS_DSUM: tl.constexpr,
    WANT_WEIGHT: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Whole rows: dx, and the partial dweight of the program's rows."""
    first = tl.program_id(0).to(tl.int64) * rows_a_program
    column = tl.arange(0, BLOCK_H)[None, :]
    within = column < width
    scale = tl.load(weight_ptr + column, mask=within, other=0.0).to(tl.float32) + offset
    dtype = dx_ptr.dtype.element_ty
    dweight = tl.zeros((ROWS, BLOCK_H), tl.float32)
    for start in range(0, rows_a_program, ROWS):
        ahead = start + tl.arange(0, ROWS)[:, None]
        row = first + ahead
        alive = (ahead < rows_a_program) & (row < rows)
        inside = alive & within
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sum_ptr + row * sum_stride + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=alive, other=0.0)
        normed = s * rstd
        if WANT_WEIGHT:
            if CAST_FIRST:
                dweight += dy * normed.to(dtype).to(tl.float32)
            else:
                dweight += dy * normed
        g = dy * scale
        dx = rstd * (g - normed * (tl.sum(g * normed, 1)[:, None] / width))
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + row * dsum_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * width + column, dx.to(dtype), mask=inside)
    if WANT_WEIGHT:
        partial = tl.sum(dweight, 0)[None, :]
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * width + column, partial, mask=within)


@triton.jit
def backward_looped_kernel(
    sum_ptr,
    rstd_ptr,
    weight_ptr,
    dy_ptr,
    dsum_ptr,
    dx_ptr,
    sum_stride,
    dy_stride,
    dsum_stride,
    width,
    offset,
    HAS_DSUM: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One wide row per program: mean(g n) over column blocks, then dx."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    rstd = tl.load(rstd_ptr + row)
    dtype = dx_ptr.dtype.element_ty
    products = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, width, BLOCK_H):
        inside = start + column < width
        scale = tl.load(weight_ptr + start + column, mask=inside, other=0.0).to(tl.float32) + offset
        dy = tl.load(dy_ptr + row * dy_stride + start + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sum_ptr + row * sum_stride + start + column, mask=inside, other=0.0).to(tl.float32)
        products += dy * scale * (s * rstd)
    mean = tl.sum(products, 0) / width
    for start in range(0, width, BLOCK_H):
        inside = start + column < width
        scale = tl.load(weight_ptr + start + column, mask=inside, other=0.0).to(tl.float32) + offset
        dy = tl.load(dy_ptr + row * dy_stride + start + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sum_ptr + row * sum_stride + start + column, mask=inside, other=0.0).to(tl.float32)
        dx = rstd * (dy * scale - s * rstd * mean)
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + row * dsum_stride + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * width + start + column, dx.to(dtype), mask=inside)


@triton.jit
def weight_kernel(
    sum_ptr,
    rstd_ptr,
    dy_ptr,
    partial_ptr,
    sum_stride,
    dy_stride,
    rows,
    width,
    rows_a_program,
    CAST_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Partial dweight of a column block over the program's rows."""
    first = tl.program_id(1).to(tl.int64) * rows_a_program
    column = (tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    dtype = sum_ptr.dtype.element_ty
    dweight = tl.zeros((ROWS, BLOCK_H), tl.float32)
    for start in range(0, rows_a_program, ROWS):
        ahead = start + tl.arange(0, ROWS)[:, None]
        row = first + ahead
        alive = (ahead < rows_a_program) & (row < rows)
        inside = alive & (column < width)
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sum_ptr + row * sum_stride + column, mask=inside, other=0.0).to(tl.float32)
        normed = s * tl.load(rstd_ptr + row, mask=alive, other=0.0)
        if CAST_FIRST:
            normed = normed.to(dtype).to(tl.float32)
        dweight += dy * normed
    partial = tl.sum(dweight, 0)[None, :]
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * width + column, partial, mask=column < width)


def _tile(width: int, chip: Chip) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile."""
    values, lanes = THREADS[chip]
    block = triton.next_power_of_2(width) if width <= WHOLE_WIDTH else min(LOOPED_BLOCK, triton.next_power_of_2(width))
    rows = max(1, TILE_ELEMENTS // block) if width <= WHOLE_WIDTH else 1
    return rows, block, max(1, min(16, rows * block // (values * lanes)))


def forward_triton(
    x_TH: Tensor,
    residual_TH: Tensor | None,
    weight_H: Tensor,
    y_TH: Tensor,
    sum_TH: Tensor,
    rstd_T: Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
) -> None:
    """Same contract as `forward_torch`."""
    rows, width = x_TH.shape
    if x_TH.numel() == 0:
        return
    tile_rows, block, warps = _tile(width, chip_of(x_TH.device))
    forward_kernel[(triton.cdiv(rows, tile_rows),)](
        x_TH, residual_TH, weight_H.contiguous(), y_TH, sum_TH, rstd_T,
        x_TH.stride(0), 0 if residual_TH is None else residual_TH.stride(0), y_TH.stride(0), rows, width, eps, offset,
        HAS_RESIDUAL=residual_TH is not None, CAST_FIRST=cast_before_weight, WHOLE=block >= width,
        ROWS=tile_rows, BLOCK_H=block, num_warps=warps,
    )  # fmt: skip


def backward_triton(
    sum_TH: Tensor,
    rstd_T: Tensor,
    weight_H: Tensor,
    dy_TH: Tensor,
    dsum_TH: Tensor | None,
    dx_TH: Tensor,
    offset: float,
    cast_before_weight: bool,
    want_weight: bool,
) -> Tensor | None:
    """Same contract as `backward_torch`."""
    rows, width = sum_TH.shape
    if sum_TH.numel() == 0:
        return torch.zeros_like(weight_H) if want_weight else None
    weight_H = weight_H.contiguous()
    processors = processors_of(sum_TH.device)
    tile_rows, block, warps = _tile(width, chip_of(sum_TH.device))
    strides = (sum_TH.stride(0), dy_TH.stride(0), 0 if dsum_TH is None else dsum_TH.stride(0))
    partial_PH = None
    if block >= width:
        programs = triton.cdiv(rows, tile_rows)
        if want_weight:
            programs = min(programs, PROGRAMS_A_PROCESSOR * processors)
            partial_PH = torch.empty(programs, width, dtype=torch.float32, device=sum_TH.device)
        backward_kernel[(programs,)](
            sum_TH, rstd_T, weight_H, dy_TH, dsum_TH, dx_TH, partial_PH, *strides, rows, width,
            triton.cdiv(rows, programs), offset,
            HAS_DSUM=dsum_TH is not None, WANT_WEIGHT=want_weight, CAST_FIRST=cast_before_weight,
            ROWS=tile_rows, BLOCK_H=block, num_warps=warps,
        )  # fmt: skip
    else:
        backward_looped_kernel[(rows,)](
            sum_TH, rstd_T, weight_H, dy_TH, dsum_TH, dx_TH, *strides, width, offset,
            HAS_DSUM=dsum_TH is not None, BLOCK_H=block, num_warps=warps,
        )  # fmt: skip
        if want_weight:
            column_rows, columns = COLUMN_TILE
            across = triton.cdiv(width, columns)
            programs = max(1, min(triton.cdiv(rows, column_rows), PROGRAMS_A_PROCESSOR * processors // across))
            partial_PH = torch.empty(programs, width, dtype=torch.float32, device=sum_TH.device)
            weight_kernel[(across, programs)](
                sum_TH, rstd_T, dy_TH, partial_PH, *strides[:2], rows, width, triton.cdiv(rows, programs),
                CAST_FIRST=cast_before_weight, ROWS=column_rows, BLOCK_H=columns, num_warps=4,
            )  # fmt: skip
    return None if partial_PH is None else partial_PH.sum(0).to(weight_H.dtype)


def aot_cases(chip: Chip) -> list[AotCase]:
    """Forward with residual and backward with and without dweight at the widths of real models, bf16."""
    cases = []
    for width, cast in ((4096, True), (2560, False), (128, True), (8192, True), (16384, True)):
        rows, block, warps = _tile(width, chip)
        whole = block >= width
        tile = {"ROWS": rows, "BLOCK_H": block}
        strides = dict.fromkeys(("sum_stride", "dy_stride", "dsum_stride"), "i32")
        cases.append(
            _case(
                f"rms_norm/forward-{width}",
                forward_kernel,
                {
                    **dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "sum_ptr"), "*bf16"),
                    "rstd_ptr": "*fp32",
                    **dict.fromkeys(("x_stride", "residual_stride", "y_stride", "rows", "width"), "i32"),
                    **dict.fromkeys(("eps", "offset"), "fp32"),
                },
                {"HAS_RESIDUAL": True, "CAST_FIRST": cast, "WHOLE": whole, **tile},
                warps,
            )
        )
        pointers = {"sum_ptr": "*bf16", "rstd_ptr": "*fp32", "weight_ptr": "*bf16"}
        pointers |= dict.fromkeys(("dy_ptr", "dsum_ptr", "dx_ptr"), "*bf16")
        if whole:
            for want in (True, False):
                cases.append(
                    _case(
                        f"rms_norm/backward-{width}{'-trained' if want else ''}",
                        backward_kernel,
                        {
                            **pointers,
                            "partial_ptr": "*fp32" if want else "constexpr",
                            **strides,
                            **dict.fromkeys(("rows", "width", "rows_a_program"), "i32"),
                            "offset": "fp32",
                        },
                        {"HAS_DSUM": True, "WANT_WEIGHT": want, "CAST_FIRST": cast, **tile},
                        warps,
                    )
                )
        else:
            cases.append(
                _case(
                    f"rms_norm/backward-{width}",
                    backward_looped_kernel,
                    {**pointers, **strides, "width": "i32", "offset": "fp32"},
                    {"HAS_DSUM": True, "BLOCK_H": block},
                    warps,
                )
            )
            cases.append(
                _case(
                    f"rms_norm/weight-{width}",
                    weight_kernel,
                    {
                        "sum_ptr": "*bf16",
                        "rstd_ptr": "*fp32",
                        "dy_ptr": "*bf16",
                        "partial_ptr": "*fp32",
                        **dict.fromkeys(("sum_stride", "dy_stride", "rows", "width", "rows_a_program"), "i32"),
                    },
                    {"CAST_FIRST": cast, "ROWS": COLUMN_TILE[0], "BLOCK_H": COLUMN_TILE[1]},
                    4,
                )
            )
    return cases


def _case(name: str, kernel, arguments: dict[str, str], constexprs: dict[str, object], warps: int) -> AotCase:
    missing = {key: None for key, kind in arguments.items() if kind == "constexpr"}
    return AotCase(
        name=name,
        kernel=kernel,
        signature=arguments | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs | missing,
        divisible=tuple(
            key for key, kind in arguments.items() if kind.startswith("*") or key.endswith("stride") or key == "width"
        ),
        options={"num_warps": warps},
    )
