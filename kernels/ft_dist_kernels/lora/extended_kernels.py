"""The Triton kernel of `extended.py`: writes S and, in further programs of the same launch, copies every B into the
spare columns of the weight. `kernels.py` has the other steps.

Shapes: T tokens, I in, O out, R rank, S concatenated ranks of a group, K = I + spare columns.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself; only constants have one.

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.lora.blocks import (
    AOT_GROUPS,
    ONE_READ_RANK,
    aot_case,
    aot_down,
    blocks_of_down,
    split_columns,
    three,
)
from ft_dist_kernels.lora.kernels import down_tile, pick
from ft_dist_kernels.lora.torch_form import Member, rows_dense
from ft_dist_kernels.lora.triton_form import down_arguments, sum_ranks

_COPY_ELEMENTS = 8192  # of the weight's spare columns, per program


@triton.jit
def _copy_factors(
    block, b0, b1, b2, weight, O0, O1, O2, R0, R1, R2, stride_w, spare,
    N: tl.constexpr, BLOCK_O: tl.constexpr, SPARE: tl.constexpr,
):  # fmt: skip
    """A block of rows of one member: its B in the columns of its ranks, zeros in the others."""
    end0 = tl.cdiv(O0, BLOCK_O)
    end1 = end0 + tl.cdiv(O1, BLOCK_O)
    b = pick(block, end0, end1, b0, b1, b2, N)
    height = pick(block, end0, end1, O0, O1, O2, N)
    rank = pick(block, end0, end1, R0, R1, R2, N)
    column = tl.arange(0, SPARE)[None, :]
    own = column - pick(block, end0, end1, 0, R0, R0 + R1, N)
    top = pick(block, end0, end1, 0, O0, O0 + O1, N)
    row = ((block - pick(block, end0, end1, 0, end0, end1, N)) * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    inside = row < height
    values = tl.load(b + row.to(tl.int64) * rank + own, mask=inside & (own >= 0) & (own < rank), other=0.0)
    tl.store(weight + (top + row).to(tl.int64) * stride_w + column, values, mask=inside & (column < spare))


@triton.jit(do_not_specialize=["T", "seed0", "seed1", "seed2", "limit0", "limit1", "limit2", "blocks"])
def down_extended_kernel(
    x, a0, a1, a2, s, T, in_features, R0, R1, R2, stride_x, stride_s,
    alpha0, alpha1, alpha2, seed0, seed1, seed2, limit0, limit1, limit2, columns_per_split,
    b0, b1, b2, weight, O0, O1, O2, stride_w, spare, blocks,
    N: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
    DROPOUT: tl.constexpr, P: tl.constexpr, BLOCK_O: tl.constexpr, SPARE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """The first `blocks` programs compute S, the rest copy B; PAD: S has unused columns, which get zeros."""
    block = tl.program_id(0)
    if block < blocks:
        down_tile(
            block, x, a0, a1, a2, s, T, in_features, R0, R1, R2, stride_x, stride_s,
            alpha0, alpha1, alpha2, seed0, seed1, seed2, limit0, limit1, limit2, columns_per_split,
            N, RP, BLOCK_T, BLOCK_I, DROPOUT, P,
        )  # fmt: skip
        if PAD:
            row = (block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
            column = R0 + R1 + R2 + tl.arange(0, SPARE)[None, :]
            zeros = tl.zeros((BLOCK_T, SPARE), s.dtype.element_ty)
            tl.store(s + row * stride_s + column, zeros, mask=(row < T) & (column < spare))
    elif tl.program_id(1) == 0:
        _copy_factors(
            block - blocks, b0, b1, b2, weight, O0, O1, O2, R0, R1, R2, stride_w, spare, N, BLOCK_O, SPARE
        )  # fmt: skip


def down_extended(
    x_TI: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    members: Sequence[Member],
    s_TS: Tensor,
    spare_OS: Tensor,
) -> None:
    """Writes S into `s_TS`, and every B into `spare_OS`: rows of its outputs, columns of its ranks. Zeros elsewhere.

    If `down` is split, a second launch adds its partial sums.
    """
    x_TI = rows_dense(x_TI)
    (tokens, in_features), spare, ranks = x_TI.shape, s_TS.shape[1], members[-1].columns.stop
    lora_a, lora_b = [a.contiguous() for a in lora_a], [b.contiguous() for b in lora_b]
    blocks = blocks_of_down(x_TI, members)
    splits, columns = split_columns(tokens, in_features, blocks)
    target = s_TS if splits == 1 else x_TI.new_empty(splits, tokens, ranks, dtype=torch.float32)
    values, constants = down_arguments(x_TI, lora_a, members, target, columns)
    padded = triton.next_power_of_2(spare)
    copied = _COPY_ELEMENTS // padded
    heights = [b.shape[0] for b in lora_b]
    programs = triton.cdiv(tokens, blocks.tokens)
    down_extended_kernel[(programs + sum(triton.cdiv(height, copied) for height in heights), splits)](
        *values,
        *three(lora_b, lora_b[0]),
        spare_OS,
        *three(heights, 0),
        spare_OS.stride(0),
        spare,
        programs,
        **constants,
        BLOCK_O=copied,
        SPARE=padded,
        PAD=splits == 1 and spare > ranks,
    )
    if splits > 1:
        sum_ranks(target, s_TS, [member._replace(alpha=1.0) for member in members], [splits] * len(members))


def aot_cases(chip: Chip) -> list[AotCase]:
    """The groups of `lora_linear` with supported ranks; rank 8 leaves spare columns unused."""
    cases = []
    for rank, members, dropout in AOT_GROUPS:
        if rank > ONE_READ_RANK:
            continue
        padded = triton.next_power_of_2(-(-rank * members // 16) * 16)
        constexprs, blocks = aot_down(chip, rank, members, dropout)
        constexprs |= {"BLOCK_O": _COPY_ELEMENTS // padded, "SPARE": padded, "PAD": rank == 8}
        label = f"down and B, rank {rank} x {members}{' dropout' if dropout else ''}"
        cases.append(aot_case(label, down_extended_kernel, constexprs, blocks.warps, blocks.stages, rank))
    return cases
