"""Launches the kernels of `kernels.py` with block sizes chosen by group and chip.

Shapes: T tokens, I in, O out, R rank, S concatenated ranks of a group.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.dropout.op import mix_seed, threshold
from ft_dist_kernels.lora.blocks import (
    AOT_GROUPS,
    DOWN,
    DOWN_BACKWARD,
    ONE_READ_RANK,
    SUM,
    UP_BACKWARD,
    aot_case,
    aot_down,
    blocks_for,
    blocks_of_down,
    group_blocks,
    padded,
    precision,
    split_columns,
    split_rows,
    three,
)
from ft_dist_kernels.lora.kernels import (
    down_backward_kernel,
    down_kernel,
    sum_gradients_kernel,
    sum_ranks_kernel,
    up_backward_kernel,
)
from ft_dist_kernels.lora.torch_form import Gradients, Member, Wanted, rows_dense, up_backward_torch


def down_arguments(
    x_TI: Tensor, lora_a: Sequence[Tensor], members: Sequence[Member], s: Tensor, columns: int
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of every kernel with a `down_tile`; S, or its partial sums, are written to `s` (..., T, ranks)."""
    blocks, rank = group_blocks(DOWN, x_TI, members)
    values = [
        x_TI,
        *three(lora_a, lora_a[0]),
        s,
        *x_TI.shape,
        *three([member.rank for member in members], 0),
        x_TI.stride(0),
        s.stride(-2),
        *three([member.alpha for member in members], 0.0),
        *three([mix_seed(member.seed) for member in members], 0),
        *three([threshold(member.dropout_p) for member in members], 0),
        columns,
    ]
    constants = {
        "N": len(members),
        "RP": rank,
        "BLOCK_T": blocks.tokens,
        "BLOCK_I": blocks.features,
        "DROPOUT": any(member.dropout_p for member in members),
        "P": precision(x_TI.dtype),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    return values, constants


def down(x_TI: Tensor, lora_a: Sequence[Tensor], members: Sequence[Member]) -> Tensor:
    """See `down_torch`."""
    x_TI, lora_a = rows_dense(x_TI), [a.contiguous() for a in lora_a]
    (tokens, in_features), ranks = x_TI.shape, sum(member.rank for member in members)
    blocks = blocks_of_down(x_TI, members)
    splits, columns = split_columns(tokens, in_features, blocks)
    s_TS = x_TI.new_empty(tokens, ranks)
    target = s_TS if splits == 1 else x_TI.new_empty(splits, tokens, ranks, dtype=torch.float32)
    values, constants = down_arguments(x_TI, lora_a, members, target, columns)
    down_kernel[(triton.cdiv(tokens, blocks.tokens), splits)](*values, **constants)
    if splits > 1:
        sum_ranks(target, s_TS, [member._replace(alpha=1.0) for member in members], [splits] * len(members))
    return s_TS


def sum_ranks(parts: Tensor, out_TS: Tensor, members: Sequence[Member], counts: Sequence[int]) -> None:
    """out = alpha times each member's columns of the first `counts` of `parts` (P, T, ranks), 0 in all others."""
    width, tokens = triton.next_power_of_2(out_TS.shape[1]), out_TS.shape[0]
    elements, depth = SUM
    rows = max(1, elements // width)
    sum_ranks_kernel[(triton.cdiv(tokens, rows),)](
        parts,
        out_TS,
        tokens,
        parts.shape[2],
        out_TS.shape[1],
        out_TS.stride(0),
        *three([member.rank for member in members], 0),
        *three([member.column for member in members], 0),
        *three(counts, 0),
        *three([member.alpha for member in members], 0.0),
        WP=width,
        BLOCK_T=rows,
        DEPTH=depth,
        num_warps=4,
    )


def _up_backward(
    s_TS: Tensor, dys: Sequence[Tensor | None], lora_b: Sequence[Tensor], members: Sequence[Member], wanted: Wanted
) -> tuple[Tensor | None, Tensor | None]:
    """dS, and dB of the members with an upstream gradient, concatenated and not yet summed: (splits, elements).

    At least one of `dys` is given.
    """
    active = [i for i, dy in enumerate(dys) if dy is not None]
    given, chosen = [dy for dy in dys if dy is not None], [members[i] for i in active]
    (tokens, ranks), widths = s_TS.shape, [dy.shape[1] for dy in given]
    rank = max(padded(member.rank) for member in chosen)
    blocks = blocks_for(UP_BACKWARD, rank, hip=torch.version.hip is not None, itemsize=s_TS.element_size())
    counts = [triton.cdiv(width, blocks.features) for width in widths]
    splits, rows_per_split = split_rows(tokens, blocks.tokens, sum(counts))
    numel = sum(width * member.rank for width, member in zip(widths, chosen, strict=True))
    need_db = any(dtype is not None for dtype in wanted.b_dtypes)
    ds_parts = s_TS.new_empty(max(counts), tokens, ranks, dtype=torch.float32) if wanted.ds else s_TS
    db_parts = s_TS.new_empty(splits, numel, dtype=torch.float32) if need_db else s_TS
    factors = [lora_b[i].contiguous() for i in active]
    up_backward_kernel[(sum(counts), splits)](
        *three(given, given[0]),
        s_TS,
        *three(factors, factors[0]),
        ds_parts,
        db_parts,
        tokens,
        *three(widths, 0),
        *three([member.rank for member in chosen], 0),
        *three([member.column for member in chosen], 0),
        *three([dy.stride(0) for dy in given], 0),
        s_TS.stride(0),
        ranks,
        rows_per_split,
        N=len(active),
        RP=rank,
        BLOCK_T=blocks.tokens,
        BLOCK_O=blocks.features,
        NEED_DS=wanted.ds,
        NEED_DB=need_db,
        P=precision(s_TS.dtype),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    ds_TS = None
    if wanted.ds:
        ds_TS = s_TS.new_empty(tokens, ranks)
        sum_ranks(ds_parts, ds_TS, chosen, counts)
    return ds_TS, (db_parts if need_db else None)


def _down_backward(
    x_TI: Tensor, ds_TS: Tensor, lora_a: Sequence[Tensor], members: Sequence[Member], wanted: Wanted
) -> tuple[Tensor | None, Tensor | None]:
    """dX, and all dA stacked, not yet summed: (splits, ranks, I)."""
    tokens, in_features = x_TI.shape
    blocks, rank = group_blocks(DOWN_BACKWARD, x_TI, members)
    columns = triton.cdiv(in_features, blocks.features)
    splits, rows_per_split = split_rows(tokens, blocks.tokens, columns)
    need_da = any(dtype is not None for dtype in wanted.a_dtypes)
    dx_TI = x_TI.new_empty(tokens, in_features) if wanted.dx else x_TI
    parts = x_TI.new_empty(splits, ds_TS.shape[1], in_features, dtype=torch.float32) if need_da else x_TI
    down_backward_kernel[(columns, splits)](
        x_TI,
        ds_TS,
        *three(lora_a, lora_a[0]),
        dx_TI,
        parts,
        tokens,
        in_features,
        *three([member.rank for member in members], 0),
        x_TI.stride(0),
        ds_TS.stride(0),
        rows_per_split,
        *three([mix_seed(member.seed) for member in members], 0),
        *three([threshold(member.dropout_p) for member in members], 0),
        N=len(members),
        RP=rank,
        BLOCK_T=blocks.tokens,
        BLOCK_I=blocks.features,
        DROPOUT=any(member.dropout_p for member in members),
        NEED_DX=wanted.dx,
        NEED_DA=need_da,
        P=precision(x_TI.dtype),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return (dx_TI if wanted.dx else None), (parts if need_da else None)


def _common(dtypes: Sequence[torch.dtype | None]) -> torch.dtype:
    """The requested dtype; fp32 if there are several."""
    distinct = {dtype for dtype in dtypes if dtype is not None}
    return distinct.pop() if len(distinct) == 1 else torch.float32


def _sum_gradients(a_parts: Tensor | None, b_parts: Tensor | None, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """The sums over the first dimension, flat; empty for None."""
    some = next(parts for parts in (a_parts, b_parts) if parts is not None)
    dtypes = (_common(wanted.a_dtypes), _common(wanted.b_dtypes))
    sums = [
        some.new_empty(0 if parts is None else parts[0].numel(), dtype=dtype)
        for parts, dtype in zip((a_parts, b_parts), dtypes, strict=True)
    ]
    block, depth = SUM
    a_blocks, b_blocks = (triton.cdiv(total.numel(), block) for total in sums)
    sum_gradients_kernel[(a_blocks + b_blocks,)](
        some if a_parts is None else a_parts,
        some if b_parts is None else b_parts,
        *(total if total.numel() else some for total in sums),
        *(total.numel() for total in sums),
        0 if a_parts is None else a_parts.shape[0],
        0 if b_parts is None else b_parts.shape[0],
        a_blocks,
        BLOCK=block,
        DEPTH=depth,
        num_warps=4,
    )
    return sums[0], sums[1]


def backward(
    x_TI: Tensor,
    s_TS: Tensor,
    dys: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    members: Sequence[Member],
    wanted: Wanted,
) -> Gradients:
    """See `backward_torch`."""
    x_TI, lora_a = rows_dense(x_TI), [a.contiguous() for a in lora_a]
    da: list[Tensor | None] = [None] * len(members)
    db: list[Tensor | None] = [None] * len(members)
    if not wanted.ds and all(dtype is None for dtype in wanted.b_dtypes):
        return Gradients(None, da, db)
    ds_TS, b_parts = None, None
    if members[0].rank > ONE_READ_RANK:  # a single member, because groups of such ranks use another form
        ds_TS = torch.empty_like(s_TS) if wanted.ds else None
        if dys[0] is not None:
            db[0] = up_backward_torch(dys[0], s_TS, lora_b[0], members[0], ds_TS, wanted.b_dtypes[0])
    else:
        ds_TS, b_parts = _up_backward(s_TS, dys, lora_b, members, wanted)
    dx_TI, a_parts = None, None
    if ds_TS is not None:
        dx_TI, a_parts = _down_backward(x_TI, ds_TS, lora_a, members, wanted)
    if a_parts is None and b_parts is None:
        return Gradients(dx_TI, da, db)
    a_sum, b_sum = _sum_gradients(a_parts, b_parts, wanted)
    begin = 0
    for i, (b_OR, dtype) in enumerate(zip(lora_b, wanted.b_dtypes, strict=True)):
        if b_parts is None or dys[i] is None:
            continue
        db[i] = None if dtype is None else b_sum[begin : begin + b_OR.numel()].view_as(b_OR).to(dtype)
        begin += b_OR.numel()
    for i, (member, dtype) in enumerate(zip(members, wanted.a_dtypes, strict=True)):
        da[i] = None if dtype is None else a_sum.view(-1, x_TI.shape[1])[member.columns].to(dtype)
    return Gradients(dx_TI, da, db)


def aot_cases(chip: Chip) -> list[AotCase]:
    """Ranks 8 to 64, single and in groups, and a single 128."""
    elements, depth = SUM
    cases = [
        aot_case("sum of gradients", sum_gradients_kernel, {"BLOCK": elements, "DEPTH": depth}, 4, 3),
    ]
    hip = chip == "gfx942"
    for rank, members, dropout in AOT_GROUPS:
        label = f"rank {rank} x {members}{' dropout' if dropout else ''}"
        constexprs, blocks = aot_down(chip, rank, members, dropout)
        cases.append(aot_case(f"down {label}", down_kernel, constexprs, blocks.warps, blocks.stages, rank))
        blocks = blocks_for(DOWN_BACKWARD, padded(rank) * members, hip=hip, itemsize=2)
        tile = {"BLOCK_T": blocks.tokens, "BLOCK_I": blocks.features, "NEED_DX": True, "NEED_DA": True}
        cases.append(
            aot_case(f"down_backward {label}", down_backward_kernel, {**constexprs, **tile}, *blocks[2:], rank=rank)
        )
        if rank > ONE_READ_RANK or not dropout:
            continue
        label = f"rank {rank} x {members}"
        blocks = blocks_for(UP_BACKWARD, padded(rank), hip=hip, itemsize=2)
        tile = {"BLOCK_T": blocks.tokens, "BLOCK_O": blocks.features, "NEED_DS": True, "NEED_DB": True}
        constexprs = {"N": members, "RP": padded(rank), "P": "tf32", **tile}
        cases.append(aot_case(f"up_backward {label}", up_backward_kernel, constexprs, *blocks[2:], rank=rank))
        width = triton.next_power_of_2(rank * members)
        constexprs = {"WP": width, "BLOCK_T": max(1, elements // width), "DEPTH": depth}
        cases.append(aot_case(f"sum of ranks, {label}", sum_ranks_kernel, constexprs, 4, 3, rank))
    return cases
