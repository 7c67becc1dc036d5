"""The steps of `lora_linear` in PyTorch: for CPU, and for ranks that are too large for the Triton form.

Shapes: T tokens, t a block of them, I in, O out, R rank, S concatenated ranks of a group.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ft_dist_kernels.dropout.op import BlockMask, mask_, masked_copy
from ft_dist_kernels.products import sum_products, transposed_product
from ft_dist_kernels.quantised.fp8_format import FP8Weight
from ft_dist_kernels.quantised.nf4 import dequantize_nf4
from ft_dist_kernels.quantised.nf4_format import NF4Weight

_MASK_BLOCK = 1 << 18  # elements of X masked at a time: the scratch stays in a core's cache


class LoraWeights(NamedTuple):
    """One linear layer and its adapter. weight (O, I), NF4 or FP8; bias (O,); lora_a (R, I); lora_b (O, R)."""

    weight: Tensor | NF4Weight | FP8Weight
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float = 1.0
    dropout_p: float = 0.0
    seed: int | None = None
    dora_magnitude: Tensor | None = None


class Member(NamedTuple):
    """The scalars of one adapter for the kernels; `column` is where its ranks start in S."""

    column: int
    rank: int
    alpha: float
    dropout_p: float
    seed: int

    @property
    def columns(self) -> slice:
        return slice(self.column, self.column + self.rank)


class Wanted(NamedTuple):
    """The dtypes of the gradients that backward has to compute; None for those it need not."""

    dx: bool
    a_dtypes: Sequence[torch.dtype | None]
    b_dtypes: Sequence[torch.dtype | None]

    @property
    def ds(self) -> bool:
        return self.dx or any(dtype is not None for dtype in self.a_dtypes)


class Gradients(NamedTuple):
    """dX is the adapters' part, the sum over members of M * (dS A)."""

    dx: Tensor | None
    da: list[Tensor | None]
    db: list[Tensor | None]


def dense_weight(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    return dequantize_nf4(weight, dtype) if isinstance(weight, NF4Weight) else weight


def _block_rows(x_TI: Tensor) -> int:
    return max(1, min(x_TI.shape[0], _MASK_BLOCK // max(x_TI.shape[1], 1)))


def row_blocks(x_TI: Tensor) -> list[slice]:
    step = _block_rows(x_TI)
    return [slice(top, min(top + step, x_TI.shape[0])) for top in range(0, x_TI.shape[0], step)]


def mask_of(
    x_TI: Tensor, member: Member, block_rows: int | None = None, share: BlockMask | None = None
) -> BlockMask | None:
    """The member's mask over x; None without dropout."""
    if member.dropout_p == 0:
        return None
    rows = torch.arange(x_TI.shape[0], device=x_TI.device)
    return BlockMask(
        rows,
        x_TI.shape[1],
        p=member.dropout_p,
        seed=member.seed,
        dtype=x_TI.dtype,
        block_rows=_block_rows(x_TI) if block_rows is None else block_rows,
        share=share,
    )


def down_torch(x_TI: Tensor, lora_a: Sequence[Tensor], members: Sequence[Member]) -> Tensor:
    """S (T, sum of ranks): alpha (X * M) A^T of every member, concatenated. Every A has x's dtype."""
    if all(member.dropout_p == 0 and member.alpha == members[0].alpha for member in members):
        stacked = lora_a[0] if len(lora_a) == 1 else torch.cat(list(lora_a))
        return sum_products([(x_TI, stacked.t())], alpha=members[0].alpha)
    s_TS = x_TI.new_empty(x_TI.shape[0], sum(member.rank for member in members))
    for member, a_RI in zip(members, lora_a, strict=True):
        mask = mask_of(x_TI, member)
        if mask is None:
            s_TS[:, member.columns] = sum_products([(x_TI, a_RI.t())], alpha=member.alpha)
            continue
        for block in row_blocks(x_TI):
            masked = masked_copy(x_TI[block], mask.bits(block))
            s_TS[block, member.columns] = sum_products([(masked, a_RI.t())], alpha=member.alpha)
    return s_TS


def backward_torch(
    x_TI: Tensor,
    s_TS: Tensor,
    dys: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    members: Sequence[Member],
    wanted: Wanted,
) -> Gradients:
    """The gradients of the adapters. Every A and B has x's dtype; a member without dY contributes nothing."""
    ds_TS = None
    if wanted.ds:
        ds_TS = torch.zeros_like(s_TS) if any(dy is None for dy in dys) else torch.empty_like(s_TS)
    db = [
        None if dy_TO is None else up_backward_torch(dy_TO, s_TS, b_OR, member, ds_TS, dtype)
        for dy_TO, b_OR, member, dtype in zip(dys, lora_b, members, wanted.b_dtypes, strict=True)
    ]
    if ds_TS is None:
        return Gradients(None, [None] * len(members), db)
    dx_TI, da = down_backward_torch(x_TI, ds_TS, lora_a, members, need_dx=wanted.dx, grad_dtypes=wanted.a_dtypes)
    return Gradients(dx_TI, da, db)


def up_backward_torch(
    dy_TO: Tensor, s_TS: Tensor, b_OR: Tensor, member: Member, ds_TS: Tensor | None, dtype: torch.dtype | None
) -> Tensor | None:
    """Writes the member's columns of dS, alpha dY B, and returns dB = dY^T S in `dtype` (None: not wanted)."""
    if ds_TS is not None:
        ds_TS[:, member.columns] = sum_products([(dy_TO, b_OR)], alpha=member.alpha)
    return None if dtype is None else transposed_product(dy_TO, s_TS[:, member.columns], dtype)


def down_backward_torch(
    x_TI: Tensor,
    ds_TS: Tensor,
    lora_a: Sequence[Tensor],
    members: Sequence[Member],
    *,
    need_dx: bool,
    grad_dtypes: Sequence[torch.dtype | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(sum over members of M * (dS A) or None, each member's dA = dS^T (X * M) or None)."""
    if all(member.dropout_p == 0 for member in members):
        return _down_backward_unmasked(x_TI, ds_TS, lora_a, members, need_dx, grad_dtypes)
    dx_TI = torch.empty_like(x_TI) if need_dx else None
    totals: list[Tensor | None] = [
        None if dtype is None else torch.zeros_like(a_RI, dtype=wide(dtype))
        for a_RI, dtype in zip(lora_a, grad_dtypes, strict=True)
    ]
    masks: list[BlockMask | None] = []
    for member in members:
        masks.append(mask_of(x_TI, member, share=next((mask for mask in masks if mask is not None), None)))
    for block in row_blocks(x_TI):
        for index, (member, a_RI, total, mask) in enumerate(zip(members, lora_a, totals, masks, strict=True)):
            ds_tR = ds_TS[block, member.columns]
            bits = None if mask is None else mask.bits(block)
            if dx_TI is not None:
                part = sum_products([(ds_tR, a_RI)])
                part = part if bits is None else mask_(part, bits)
                dx_TI[block] = part if index == 0 else part.add_(dx_TI[block])
            if total is not None:
                masked = x_TI[block] if bits is None else masked_copy(x_TI[block], bits)
                total.addmm_(ds_tR.t().to(total.dtype), masked.to(total.dtype))
    grads = [None if t is None else t.to(dtype) for t, dtype in zip(totals, grad_dtypes, strict=True)]
    return dx_TI, grads


def _down_backward_unmasked(
    x_TI: Tensor,
    ds_TS: Tensor,
    lora_a: Sequence[Tensor],
    members: Sequence[Member],
    need_dx: bool,
    grad_dtypes: Sequence[torch.dtype | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    grads: list[Tensor | None] = [None] * len(members)
    wanted = {dtype for dtype in grad_dtypes if dtype is not None}
    if wanted:
        stacked = transposed_product(ds_TS, x_TI, wanted.pop() if len(wanted) == 1 else torch.float32)
        for index, (member, dtype) in enumerate(zip(members, grad_dtypes, strict=True)):
            if dtype is not None:
                grads[index] = stacked[member.columns].to(dtype)
    if not need_dx:
        return None, grads
    stacked_a = lora_a[0] if len(lora_a) == 1 else torch.cat(list(lora_a))
    return sum_products([(ds_TS, stacked_a)]), grads


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tokens."""
    return torch.promote_types(dtype, torch.float32)


def rows_dense(dy_TO: Tensor) -> Tensor:
    """GEMMs and kernels need rows with unit stride; an expanded gradient (from `sum`) has stride 0."""
    return dy_TO if dy_TO.stride(1) == 1 and dy_TO.stride(0) >= dy_TO.shape[1] else dy_TO.contiguous()
