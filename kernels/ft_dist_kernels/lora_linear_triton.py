"""Launches the kernels of `lora_linear_kernels.py` with block sizes chosen for the group and the chip.

Shapes: T tokens, I in, O out, R rank, S ranks of a group side by side.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.dropout import mix_seed, threshold
from ft_dist_kernels.lora_linear_kernels import down_backward_kernel, down_kernel, sum_kernel, up_backward_kernel
from ft_dist_kernels.lora_linear_torch import Member, up_backward_torch

# Programs a launch aims for when it splits tokens: about two for each multiprocessor of the largest chip. A constant,
# because the split decides the order of the sums, and so the bits.
_PROGRAMS = 256
_SUM_BLOCK = 1024
# Above this rank dB no longer fits beside its tile, and the partial sums of dS would cost more than reading dY again.
_ONE_READ_RANK = 64


class Blocks(NamedTuple):
    tokens: int
    features: int
    warps: int
    stages: int


# Keyed by the padded ranks held on chip (members * rank for the two `down` kernels, rank for `up`), the first that is
# large enough. Chosen so that no chip spills or exceeds its shared memory (`python -m benchmarks.kernels.resources`);
# CDNA3 gives a lane 512 registers at four warps and 256 at eight, and its 64 KiB of LDS hold two stages at most.
_Table = dict[int, Blocks]
_DOWN: dict[str, _Table] = {
    "cuda": {
        32: Blocks(64, 128, 4, 3),
        48: Blocks(64, 64, 8, 3),
        64: Blocks(64, 64, 4, 3),
        128: Blocks(64, 64, 8, 3),
        192: Blocks(32, 64, 8, 3),
    },
    "hip": {48: Blocks(64, 128, 4, 2), 96: Blocks(64, 64, 4, 2), 192: Blocks(64, 64, 8, 2)},
}
_UP_BACKWARD: dict[str, _Table] = {
    "cuda": {16: Blocks(32, 512, 8, 2), 32: Blocks(32, 256, 8, 3), 64: Blocks(32, 256, 8, 3)},
    "hip": {16: Blocks(32, 512, 8, 2), 32: Blocks(32, 256, 8, 2), 64: Blocks(32, 128, 8, 2)},
}
_DOWN_BACKWARD: dict[str, _Table] = {
    "cuda": {32: Blocks(64, 128, 8, 3), 96: Blocks(64, 64, 8, 3), 192: Blocks(64, 32, 8, 2)},
    "hip": {32: Blocks(64, 128, 8, 2), 96: Blocks(64, 64, 4, 2), 192: Blocks(64, 32, 4, 2)},
}


def _blocks(tables: dict[str, _Table], ranks: int, *, hip: bool, itemsize: int) -> Blocks:
    chosen = next(blocks for limit, blocks in tables["hip" if hip else "cuda"].items() if ranks <= limit)
    if itemsize > 2:
        # fp32 operands take twice the shared memory, and their products run on registers.
        return chosen._replace(features=max(16, chosen.features // 4), stages=1)
    return chosen


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _precision(dtype: torch.dtype) -> str:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def _split_rows(tokens: int, block: int, columns: int) -> tuple[int, int]:
    """(splits of the rows, rows of each), from the shapes alone."""
    blocks = triton.cdiv(tokens, block)
    per_split = triton.cdiv(blocks, min(blocks, max(1, _PROGRAMS // columns)))
    return triton.cdiv(blocks, per_split), per_split * block


def _three(values: Sequence[Any], filler: Any) -> list[Any]:
    return [*values, *[filler] * (3 - len(values))]


def _sum_parts(parts: Tensor, out: Tensor, alpha: float) -> None:
    """out (rows, columns, unit stride of columns) = alpha * parts.sum(0), in a fixed order."""
    numel = out.numel()
    sum_kernel[(triton.cdiv(numel, _SUM_BLOCK),)](
        parts, out, numel, out.shape[1], out.stride(0), parts.shape[0], alpha, BLOCK=_SUM_BLOCK, num_warps=4
    )


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _group_blocks(tables: dict[str, _Table], x_TI: Tensor, members: Sequence[Member]) -> tuple[Blocks, int]:
    rank = max(_padded(member.rank) for member in members)
    hip = torch.version.hip is not None
    return _blocks(tables, rank * len(members), hip=hip, itemsize=x_TI.element_size()), rank


def down(x_TI: Tensor, lora_a: Sequence[Tensor], members: Sequence[Member]) -> Tensor:
    """See `down_torch`."""
    x_TI, lora_a = _rows(x_TI), [a.contiguous() for a in lora_a]
    blocks, rank = _group_blocks(_DOWN, x_TI, members)
    s_TS = x_TI.new_empty(x_TI.shape[0], sum(member.rank for member in members))
    down_kernel[(triton.cdiv(x_TI.shape[0], blocks.tokens),)](
        x_TI,
        *_three(lora_a, lora_a[0]),
        s_TS,
        *x_TI.shape,
        *_three([member.rank for member in members], 0),
        x_TI.stride(0),
        s_TS.stride(0),
        *_three([member.alpha for member in members], 0.0),
        *_three([mix_seed(member.seed) for member in members], 0),
        *_three([threshold(member.dropout_p) for member in members], 0),
        N=len(members),
        RP=rank,
        BLOCK_T=blocks.tokens,
        BLOCK_I=blocks.features,
        DROPOUT=any(member.dropout_p for member in members),
        P=_precision(x_TI.dtype),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return s_TS


def up_backward(
    dy_TO: Tensor, s_TR: Tensor, b_OR: Tensor, alpha: float, ds_TR: Tensor | None, grad_dtype: torch.dtype | None
) -> Tensor | None:
    """See `up_backward_torch`."""
    (tokens, out_features), rank = dy_TO.shape, b_OR.shape[1]
    if rank > _ONE_READ_RANK or (ds_TR is None and grad_dtype is None):
        return up_backward_torch(dy_TO, s_TR, b_OR, alpha, ds_TR, grad_dtype)
    b_OR = b_OR.contiguous()
    hip = torch.version.hip is not None
    blocks = _blocks(_UP_BACKWARD, _padded(rank), hip=hip, itemsize=dy_TO.element_size())
    columns = triton.cdiv(out_features, blocks.features)
    splits, rows_per_split = _split_rows(tokens, blocks.tokens, columns)
    ds_parts = dy_TO.new_empty(columns, tokens, rank, dtype=torch.float32) if ds_TR is not None else dy_TO
    db_parts = dy_TO.new_empty(splits, out_features, rank, dtype=torch.float32) if grad_dtype is not None else dy_TO
    up_backward_kernel[(columns, splits)](
        dy_TO,
        s_TR,
        b_OR,
        ds_parts,
        db_parts,
        tokens,
        out_features,
        rank,
        dy_TO.stride(0),
        s_TR.stride(0),
        rows_per_split,
        RP=_padded(rank),
        BLOCK_T=blocks.tokens,
        BLOCK_O=blocks.features,
        NEED_DS=ds_TR is not None,
        NEED_DB=grad_dtype is not None,
        P=_precision(dy_TO.dtype),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    if ds_TR is not None:
        _sum_parts(ds_parts, ds_TR, alpha)
    if grad_dtype is None:
        return None
    db_OR = torch.empty(b_OR.shape, dtype=grad_dtype, device=b_OR.device)
    _sum_parts(db_parts, db_OR, 1.0)
    return db_OR


def down_backward(
    x_TI: Tensor,
    ds_TS: Tensor,
    lora_a: Sequence[Tensor],
    members: Sequence[Member],
    *,
    need_dx: bool,
    grad_dtypes: Sequence[torch.dtype | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """See `down_backward_torch`."""
    x_TI, lora_a = _rows(x_TI), [a.contiguous() for a in lora_a]
    tokens, in_features = x_TI.shape
    blocks, rank = _group_blocks(_DOWN_BACKWARD, x_TI, members)
    columns = triton.cdiv(in_features, blocks.features)
    splits, rows_per_split = _split_rows(tokens, blocks.tokens, columns)
    need_da = any(dtype is not None for dtype in grad_dtypes)
    dx_TI = x_TI.new_empty(tokens, in_features) if need_dx else x_TI
    parts = x_TI.new_empty(splits, ds_TS.shape[1], in_features, dtype=torch.float32) if need_da else x_TI
    down_backward_kernel[(columns, splits)](
        x_TI,
        ds_TS,
        *_three(lora_a, lora_a[0]),
        dx_TI,
        parts,
        tokens,
        in_features,
        *_three([member.rank for member in members], 0),
        x_TI.stride(0),
        ds_TS.stride(0),
        rows_per_split,
        *_three([mix_seed(member.seed) for member in members], 0),
        *_three([threshold(member.dropout_p) for member in members], 0),
        N=len(members),
        RP=rank,
        BLOCK_T=blocks.tokens,
        BLOCK_I=blocks.features,
        DROPOUT=any(member.dropout_p for member in members),
        NEED_DX=need_dx,
        NEED_DA=need_da,
        P=_precision(x_TI.dtype),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    grads: list[Tensor | None] = [None] * len(members)
    if need_da:
        dtypes = {dtype for dtype in grad_dtypes if dtype is not None}
        total = x_TI.new_empty(ds_TS.shape[1], in_features, dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32)
        _sum_parts(parts, total, 1.0)
        for index, (member, dtype) in enumerate(zip(members, grad_dtypes, strict=True)):
            grads[index] = None if dtype is None else total[member.columns].to(dtype)
    return (dx_TI if need_dx else None), grads


def _signature(kernel: Any, types: dict[str, str]) -> dict[str, str]:
    """Every argument of the kernel in order; those not in `types` are 16-bit or partial-sum pointers, or constants."""
    return {name: types.get(name, "constexpr" if name.isupper() else "*bf16") for name in kernel.arg_names}


_TYPES = {
    **dict.fromkeys(
        ("T", "in_features", "out_features", "R", "R0", "R1", "R2", "rows_per_split", "stride_x", "stride_s"), "i32"
    ),
    **dict.fromkeys(("stride_ds", "stride_dy", "stride_out", "limit0", "limit1", "limit2"), "i32"),
    **dict.fromkeys(("numel", "columns", "splits"), "i32"),
    **dict.fromkeys(("seed0", "seed1", "seed2"), "i64"),
    **dict.fromkeys(("alpha0", "alpha1", "alpha2", "alpha"), "fp32"),
    **dict.fromkeys(("ds_parts", "db_parts", "da_parts", "parts"), "*fp32"),
}


def _case(name: str, kernel: Any, constexprs: dict[str, Any], warps: int, stages: int, rank: int = 16) -> AotCase:
    signature = _signature(kernel, _TYPES)
    known = {name for name, kind in signature.items() if kind.startswith("*")} | {"T", "in_features"}
    known |= {"out_features", "rows_per_split", "stride_x", "stride_dy", "numel", "columns", "stride_out"}
    if rank % 16 == 0:
        known |= {"R", "R0", "R1", "R2", "stride_s", "stride_ds"}
    divisible = tuple(name for name in signature if name in known)
    return AotCase(name, kernel, signature, constexprs, divisible, {"num_warps": warps, "num_stages": stages})


def aot_cases(chip: Chip) -> list[AotCase]:
    """Ranks 8 to 64, alone and in groups, and 128 alone; every size with dropout, some also without."""
    cases = [_case("sum of parts", sum_kernel, {"BLOCK": _SUM_BLOCK}, 4, 3)]
    hip = chip == "gfx942"
    for rank, members in ((8, 1), (16, 1), (16, 3), (32, 2), (64, 1), (64, 2), (64, 3), (128, 1)):
        padded = _padded(rank)
        for dropout in (True, False) if (rank, members) in ((16, 1), (64, 3)) else (True,):
            label = f"rank {rank} x {members}{' dropout' if dropout else ''}"
            common = {"N": members, "RP": padded, "DROPOUT": dropout, "P": "tf32"}
            blocks = _blocks(_DOWN, padded * members, hip=hip, itemsize=2)
            tile = {"BLOCK_T": blocks.tokens, "BLOCK_I": blocks.features}
            cases.append(_case(f"down {label}", down_kernel, {**common, **tile}, blocks.warps, blocks.stages, rank))
            blocks = _blocks(_DOWN_BACKWARD, padded * members, hip=hip, itemsize=2)
            tile = {"BLOCK_T": blocks.tokens, "BLOCK_I": blocks.features, "NEED_DX": True, "NEED_DA": True}
            cases.append(
                _case(f"down_backward {label}", down_backward_kernel, {**common, **tile}, *blocks[2:], rank=rank)
            )
        if members == 1 and rank <= _ONE_READ_RANK:
            blocks = _blocks(_UP_BACKWARD, padded, hip=hip, itemsize=2)
            tile = {"BLOCK_T": blocks.tokens, "BLOCK_O": blocks.features, "NEED_DS": True, "NEED_DB": True}
            constexprs = {"RP": padded, "P": "tf32", **tile}
            cases.append(_case(f"up_backward rank {rank}", up_backward_kernel, constexprs, *blocks[2:], rank=rank))
    return cases
