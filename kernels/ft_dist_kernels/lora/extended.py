"""Linear layers with adapters that read the same x, as one product over an extended weight.

    Y = [X | S] [W | B]^T + b,   S = alpha (X * M) A^T

The frozen weights of the members are stacked in one buffer with spare columns for every B: a member's B occupies the
rows of its outputs and the columns of its ranks, with zeros elsewhere. X comes in a buffer with as many spare columns,
for S. A forward pass is then two launches: one writes S and copies the B's, so that the copies are never stale, the
other multiplies. If X has no spare columns, S is separate: S B^T is written and X W^T is added to it.

The backward pass reads dY of all members as one matrix, so the gradient of X also needs only one product:

    dS = alpha dY B    dB = dY^T S    dA = dS^T (X * M)    dX = dY W + M * (dS A)

Saved for backward: x with S in its spare columns (or x and S), and the adapters. Numbers as in `lora_linear`.

Shapes: T tokens, I in, O the outputs of all members, S their concatenated ranks, K = I + spare columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft_dist_kernels.backend import Backend
from ft_dist_kernels.lora.op import (
    MAX_GROUP,
    LoraWeights,
    Plan,
    check_member,
    pieces_of,
    plan_of,
)
from ft_dist_kernels.lora.torch_form import Wanted, down_torch, rows_dense
from ft_dist_kernels.products import sum_products
from ft_dist_kernels.sizes import MAX_EXTENDED_RANK

_ALIGNMENT = 16  # elements: rows start at addresses that suit tensor cores and vector loads


def extended_spare(ranks: Sequence[int]) -> int:
    """Spare columns that a group with these ranks needs after each row of x and of its weights."""
    return -(-sum(ranks) // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, eq=False)
class ExtendedWeight:
    """The frozen weights of a group in one buffer (O, I + spare), and its biases in one vector.

    `views` (one (O_i, I) per member) and `bias_views` (one (O_i,) per member, None without a bias) replace the
    parameters' storage: `weight.data = extended.views[i]`. Otherwise the weights exist twice.
    """

    buffer: Tensor
    bias: Tensor | None
    views: tuple[Tensor, ...]
    bias_views: tuple[Tensor | None, ...]
    spare: int

    @classmethod
    def extend(
        cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None], ranks: Sequence[int], dtype: torch.dtype
    ) -> "ExtendedWeight":
        """Copies weights (O_i, I) and biases (O_i,) or None into a new buffer of `dtype` with columns for `ranks`.

        Raises ValueError for mismatched shapes.
        """
        if not weights or any(w.dim() != 2 or w.shape[1] != weights[0].shape[1] for w in weights):
            shapes = [tuple(w.shape) for w in weights]
            raise ValueError(
                f"weights have shapes {shapes}; a group needs (out, in) with the same `in`, unpartitioned."
            )
        heights, spare = [w.shape[0] for w in weights], extended_spare(ranks)
        with torch.no_grad():
            buffer = weights[0].new_zeros(sum(heights), weights[0].shape[1] + spare, dtype=dtype)
            bias = weights[0].new_zeros(sum(heights), dtype=dtype) if any(b is not None for b in biases) else None
            rows = buffer[:, : weights[0].shape[1]].split(heights)
            parts: Sequence[Tensor | None] = [None] * len(weights) if bias is None else bias.split(heights)
            for source, target in zip((*weights, *biases), (*rows, *parts), strict=True):
                if source is not None and target is not None:
                    target.copy_(source)
        # `.data` has a separate version counter, so a write to the spare columns does not count as one to W
        views = tuple(row.data for row in rows)
        kept = (None if b is None or part is None else part.data for b, part in zip(biases, parts, strict=True))
        return cls(buffer, bias, views, tuple(kept), spare)

    @property
    def in_features(self) -> int:
        return self.buffer.shape[1] - self.spare

    def holds(self, members: Sequence[LoraWeights]) -> bool:
        """Whether the members' frozen parameters are this buffer's views."""
        return len(members) == len(self.views) and all(
            _same(member.weight, view) and _same(member.bias, bias)
            for member, view, bias in zip(members, self.views, self.bias_views, strict=True)
        )


def _same(tensor: Any, view: Tensor | None) -> bool:
    if tensor is None or view is None:
        return tensor is None and view is None
    return (
        isinstance(tensor, Tensor)
        and tensor.untyped_storage()._cdata == view.untyped_storage()._cdata
        and tensor.storage_offset() == view.storage_offset()
        and tensor.shape == view.shape
        and tensor.stride() == view.stride()
    )


def suits_extended(members: Sequence[LoraWeights], *, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether `lora_linear_extended` supports this group and is faster: 16-bit on a GPU, frozen dense weights and
    biases, no DoRA, and ranks and sizes that fit the kernels. `lora_linear_group` handles the rest."""
    if dtype not in (torch.bfloat16, torch.float16) or torch.device(device).type != "cuda":
        return False
    # a GEMM needs rows that start at multiples of 16 bytes
    return _misfit(members, dtype) is None and all(member.weight.shape[1] % 8 == 0 for member in members)


def _misfit(members: Sequence[LoraWeights], dtype: torch.dtype) -> str | None:
    """Why a group cannot be extended, or None."""
    if not 0 < len(members) <= MAX_GROUP:
        return f"a group has 1 to {MAX_GROUP} members, not {len(members)}"
    for index, member in enumerate(members):
        weight, bias, rank = member.weight, member.bias, member.lora_a.shape[0]
        if not isinstance(weight, Tensor):
            return f"the weight of members[{index}] is quantised"
        if weight.dim() != 2 or weight.dtype != dtype:
            return f"the weight of members[{index}] is {weight.dtype} {tuple(weight.shape)}, not {dtype} (out, in)"
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return f"the weight or bias of members[{index}] is trained"
        if member.dora_magnitude is not None:
            return f"members[{index}] uses DoRA"
        if rank > MAX_EXTENDED_RANK:
            return f"members[{index}] has rank {rank}, above {MAX_EXTENDED_RANK}"
    return None


class _Extended(torch.autograd.Function):
    """Inputs after x: (lora_a, lora_b) of every member."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, extended: ExtendedWeight, spare: int, x_TI: Tensor, *flat: Tensor) -> Tensor:
        lora_a, lora_b = ([factor.to(x_TI.dtype) for factor in flat[i::2]] for i in (0, 1))
        ctx.plan, ctx.extended, ctx.device = plan, extended, x_TI.device.type
        (tokens, inner), width = x_TI.shape, extended.buffer.shape[1]
        if spare:
            # saved with x's version counter, which detects a later in-place change of x; written without it
            x_TK = x_TI.detach().as_strided((tokens, width), (width, 1))
            _fill(plan, extended, x_TI, x_TK.data[:, inner:], lora_a, lora_b)
            ctx.save_for_backward(x_TK, None, *flat)
            return sum_products([(x_TK, extended.buffer.t())], bias_N=extended.bias)
        s_TS = x_TI.new_empty(tokens, extended.spare)
        _fill(plan, extended, x_TI, s_TS, lora_a, lora_b)
        ctx.save_for_backward(x_TI, s_TS, *flat)
        w_IO, b_SO = extended.buffer[:, :inner].t(), extended.buffer[:, inner:].t()
        return sum_products([(s_TS, b_SO), (x_TI, w_IO)], bias_N=extended.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        with torch.autocast(ctx.device, enabled=False):
            return None, None, None, *_backward(ctx, dy_TO)


def _fill(
    plan: Plan,
    extended: ExtendedWeight,
    x_TI: Tensor,
    s_TS: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
) -> None:
    """Writes S, and every B into the spare columns of the weight; unused columns get zeros."""
    spare_OS = extended.buffer.data[:, extended.in_features :]
    if plan.triton:
        from ft_dist_kernels.lora.extended_kernels import down_extended

        down_extended(x_TI, lora_a, lora_b, plan.members, s_TS, spare_OS)
        return
    ranks = plan.members[-1].columns.stop
    s_TS[:, :ranks] = down_torch(x_TI, lora_a, plan.members)
    s_TS[:, ranks:] = 0
    rows = spare_OS.zero_().split([view.shape[0] for view in extended.views])
    for member, row, b_OR in zip(plan.members, rows, lora_b, strict=True):
        row[:, member.columns] = b_OR


def _backward(ctx: Any, dy_TO: Tensor) -> list[Tensor | None]:
    """The gradients of x and of each adapter."""
    x_TI, s_TS, *flat = ctx.saved_tensors
    plan, extended = ctx.plan, ctx.extended
    inner = extended.in_features
    if s_TS is None:
        x_TI, s_TS = x_TI[:, :inner], x_TI[:, inner:]
    s_TS = s_TS[:, : plan.members[-1].columns.stop]
    need_x, *needs = ctx.needs_input_grad[3:]
    dtypes = [factor.dtype if need else None for factor, need in zip(flat, needs, strict=True)]
    lora_a, lora_b = ([factor.to(x_TI.dtype) for factor in flat[i::2]] for i in (0, 1))
    dy_TO = rows_dense(dy_TO)
    dys = dy_TO.split([view.shape[0] for view in extended.views], 1)
    wanted = Wanted(need_x, dtypes[0::2], dtypes[1::2])
    dx_TI, da, db = pieces_of(plan.triton).backward(x_TI, s_TS, dys, lora_a, lora_b, plan.members, wanted)
    if dx_TI is not None:
        dx_TI = sum_products([(dy_TO, extended.buffer[:, :inner])], out=dx_TI)
    return [dx_TI, *(grad for pair in zip(da, db, strict=True) for grad in pair)]


def _checked(x: Tensor, extended: ExtendedWeight, members: Sequence[LoraWeights], spare: int) -> Tensor:
    """x as (T, I). Raises ValueError naming the value, the rule and the fix."""
    inner, ranks = extended.in_features, [member.lora_a.shape[0] for member in members]
    problem = _misfit(members, x.dtype)
    if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) != x.dtype:
        problem = f"autocast uses {torch.get_autocast_dtype(x.device.type)} and x is {x.dtype}"
    if problem is not None:
        raise ValueError(f"{problem}. Use lora_linear_group.")
    for member in members:
        check_member(x, member, x.dtype)
    if not extended.holds(members):
        raise ValueError(
            "the members' weights and biases are not the views of this ExtendedWeight. Set weight.data = "
            "extended.views[i] and bias.data = extended.bias_views[i], and extend again after moving the module."
        )
    if sum(ranks) > extended.spare:
        raise ValueError(f"ranks {ranks} need {sum(ranks)} spare columns; this ExtendedWeight has {extended.spare}.")
    if spare == 0:
        return x.reshape(-1, inner)
    if spare != extended.spare:
        raise ValueError(f"spare={spare}; it must be 0 or this ExtendedWeight's {extended.spare}.")
    width, storage = inner + spare, x.untyped_storage().nbytes() // x.element_size()
    x_TI = _rows_of(x, inner)
    fits = x_TI is not None and x_TI.stride(1) == 1 and (x_TI.shape[0] <= 1 or x_TI.stride(0) == width)
    if x_TI is None or not fits or x.storage_offset() + x_TI.shape[0] * width > storage:
        raise ValueError(
            f"x {tuple(x.shape)} has strides {x.stride()} in a storage of {storage} elements; with spare={spare} it "
            f"must be the first {inner} columns of a buffer with rows of {width}. Otherwise pass spare=0."
        )
    return x_TI


def _rows_of(x: Tensor, inner: int) -> Tensor | None:
    """x as (T, I) without a copy; None where its strides do not allow that."""
    try:
        return x.view(-1, inner)
    except RuntimeError:
        return None


@torch._disable_dynamo
def lora_linear_extended(
    x: Tensor,
    extended: ExtendedWeight,
    members: Sequence[LoraWeights],
    *,
    spare: int,
    backend: Backend = "auto",
) -> Tensor:
    """The concatenated outputs (..., O) of all members for x (..., I); their gradient has the same form.

    With `spare` > 0 x must be the first I columns of a buffer (..., I + spare), spare = `extended.spare`, allocated for
    this call: its last columns are overwritten and reserved until the backward pass is done. `spare` = 0: any x.
    The members' weights and biases are `extended.views` and `.bias_views`, frozen; their dtype is x's. Adapters,
    dropout and gradients as in `lora_linear_group`.

    Raises ValueError for unsupported shapes, dtypes, strides or members.
    """
    x_TI = _checked(x, extended, members, spare)
    flat = [factor for member in members for factor in (member.lora_a, member.lora_b)]
    y_TO = _Extended.apply(plan_of(x_TI, members, backend), extended, spare, x_TI, *flat)
    return y_TO.view(*x.shape[:-1], y_TO.shape[1])
