"""A linear layer with a low-rank adapter, forward and backward, alone or in groups that share their input.

    Y = X W^T + b + S B^T,   S = alpha (X * M) A^T,   alpha = scale / (1 - p)

M is the adapter's dropout mask (`dropout/op.py`): regenerated in backward, never stored. Saved for backward: the
parameters, X and S; nothing else of size T. Backward:

    dS = alpha dY B    dB = dY^T S    dA = dS^T (X * M)    dX = dY W + M * (dS A)    dW = dY^T X    db = sum_t dY

The low-rank term is written first and the large product is added to it, so its memory traffic overlaps with a
compute-bound GEMM and the sum is rounded once. Members of a group share X: one S, one dX. Reductions over tokens have a
fixed order (no atomics): the same inputs give the same bits.

The parameter objects themselves are saved, so a parameter whose storage is released after forward and gathered again
before backward (ZeRO-3) is read from its new storage.

Shapes: T tokens, I in, O out, R rank. Sources: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732, only the scale
differs), DoRA (arXiv 2402.09353, in `dora.py`), the split at S from LoRAFusion (arXiv 2510.00206).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft_dist_kernels.backend import Backend, use_triton
from ft_dist_kernels.dropout.op import draw_seed, dropout_reference, effective_p
from ft_dist_kernels.lora.dora import dora_linear
from ft_dist_kernels.lora.torch_form import (
    LoraWeights,
    Member,
    Wanted,
    backward_torch,
    dense_weight,
    down_torch,
    rows_dense,
    wide,
)
from ft_dist_kernels.products import sum_products, transposed_product
from ft_dist_kernels.quantised.fp8 import check_fp8_input, fp8_backward, fp8_forward
from ft_dist_kernels.quantised.fp8_format import FP8Weight
from ft_dist_kernels.quantised.nf4_format import NF4Weight

MAX_GROUP = 3  # members that one kernel launch handles (q, k, v); larger groups run in slices
MAX_TRITON_RANKS = 192  # per group, each member padded to a power of two; more do not fit on chip next to a tile

__all__ = ["LoraWeights", "lora_linear", "lora_linear_group", "lora_linear_reference"]


class Pieces(NamedTuple):
    """The two steps that each backend implements."""

    down: Any
    backward: Any


def pieces_of(triton: bool) -> Pieces:
    if not triton:
        return Pieces(down_torch, backward_torch)
    from ft_dist_kernels.lora import triton_form as kernels

    return Pieces(kernels.down, kernels.backward)


class Plan(NamedTuple):
    members: tuple[Member, ...]
    quantized: tuple[NF4Weight | FP8Weight | None, ...]
    triton: bool

    @property
    def fp8_backend(self) -> Backend:
        return "triton" if self.triton else "auto"


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
) -> Tensor:
    """The formula in plain PyTorch, differentiable."""
    x_TI = x.reshape(-1, x.shape[-1])
    dropped_TI = dropout_reference(x_TI, p=dropout_p, seed=dropout_seed) if dropout_p else x_TI
    y_TO = torch.nn.functional.linear(x_TI, weight, bias) + scale * (dropped_TI @ lora_a.t()) @ lora_b.t()
    return y_TO.reshape(*x.shape[:-1], weight.shape[0])


class _LoraLinear(torch.autograd.Function):
    """Inputs after the plan: x, then (weight or None if quantized, bias or None, lora_a, lora_b) of every member."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x_TI: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        packs = [flat[i : i + 4] for i in range(0, len(flat), 4)]
        s_TS = pieces_of(plan.triton).down(x_TI, [a.to(x_TI.dtype) for _, _, a, _ in packs], plan.members)
        fp8 = [weight for weight in plan.quantized if isinstance(weight, FP8Weight)]
        bases = iter(fp8_forward(x_TI, fp8, backend=plan.fp8_backend) if fp8 else [])
        outputs = []
        for member, quantized, (weight, bias, _, b_OR) in zip(plan.members, plan.quantized, packs, strict=True):
            products, base = [(s_TS[:, member.columns], b_OR.to(x_TI.dtype).t())], None
            if isinstance(quantized, FP8Weight):
                base = next(bases)
            else:
                w_OI = dense_weight(weight if quantized is None else quantized, x_TI.dtype)
                products.append((x_TI, w_OI.t()))
            bias = None if bias is None else bias.to(x_TI.dtype)
            outputs.append(sum_products(products, bias_N=bias, out=base))
        ctx.plan, ctx.device = plan, x_TI.device.type
        ctx.bias_dtypes = [None if bias is None else bias.dtype for _, bias, _, _ in packs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_TI, s_TS, *(tensor for weight, _, a, b in packs for tensor in (weight, a, b)))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        if torch.is_autocast_enabled(ctx.device):
            with torch.autocast(ctx.device, enabled=False):
                return None, *_backward(ctx, upstream)
        return None, *_backward(ctx, upstream)


def _backward(ctx: Any, upstream: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of x and of each tensor of the members."""
    x_TI, s_TS, *saved = ctx.saved_tensors
    packs = [saved[i : i + 3] for i in range(0, len(saved), 3)]
    need_x, needs = ctx.needs_input_grad[1], [ctx.needs_input_grad[i : i + 4] for i in range(2, 2 + 4 * len(packs), 4)]
    grads: list[list[Tensor | None]] = [[None] * 4 for _ in packs]
    dys = [None if dy is None else rows_dense(dy) for dy in upstream]
    if all(dy is None for dy in dys):
        return [None] * (1 + 4 * len(packs))
    for i, (dy_TO, (weight, _, _), (need_w, need_bias, _, _)) in enumerate(zip(dys, packs, needs, strict=True)):
        if dy_TO is not None and need_w:
            grads[i][0] = transposed_product(dy_TO, x_TI, weight.dtype)
        if dy_TO is not None and need_bias:
            grads[i][1] = dy_TO.sum(0, dtype=wide(dy_TO.dtype)).to(ctx.bias_dtypes[i])
    taken = [(dy is not None and need[2], dy is not None and need[3]) for dy, need in zip(dys, needs, strict=True)]
    wanted = Wanted(
        need_x,
        [a.dtype if need_a else None for (need_a, _), (_, a, _) in zip(taken, packs, strict=True)],
        [b.dtype if need_b else None for (_, need_b), (_, _, b) in zip(taken, packs, strict=True)],
    )
    lora_a, lora_b = ([pack[i].to(x_TI.dtype) for pack in packs] for i in (1, 2))
    dx_TI, da, db = pieces_of(ctx.plan.triton).backward(x_TI, s_TS, dys, lora_a, lora_b, ctx.plan.members, wanted)
    for i, member_grads in enumerate(grads):
        member_grads[2:] = da[i], db[i]
    if dx_TI is not None:
        frozen = [(dy, packs[i][0], ctx.plan.quantized[i]) for i, dy in enumerate(dys) if dy is not None]
        dx_TI = _add_base(dx_TI, frozen, ctx.plan.fp8_backend)
    return [dx_TI, *(grad for member_grads in grads for grad in member_grads)]


def _add_base(
    dx_TI: Tensor, members: Sequence[tuple[Tensor, Tensor, NF4Weight | FP8Weight | None]], fp8_backend: Backend
) -> Tensor:
    """dX + dY W of every member."""
    dense = [(dy_TO, weight) for dy_TO, weight, quantized in members if quantized is None]
    if dense:
        dx_TI = sum_products(dense, out=dx_TI)
    for dy_TO, _, quantized in members:  # one dequantised weight alive at a time
        if isinstance(quantized, NF4Weight):
            dx_TI = sum_products([(dy_TO, dense_weight(quantized, dx_TI.dtype))], out=dx_TI)
    fp8 = [(dy_TO, quantized) for dy_TO, _, quantized in members if isinstance(quantized, FP8Weight)]
    if fp8:
        dys, weights = zip(*fp8, strict=True)
        dx_TI.add_(fp8_backward(dys, weights, backend=fp8_backend))
    return dx_TI


def check_member(x: Tensor, member: LoraWeights, dtype: torch.dtype) -> None:
    """Raises ValueError naming the value, the rule and the fix."""
    weight, a, b = member.weight, member.lora_a, member.lora_b
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; x has {x.shape[-1]} features, so it must be (out, "
            f"{x.shape[-1]}). An empty weight is one that ZeRO-3 has partitioned: call inside the module that owns it."
        )
    out_features = weight.shape[0]
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != x.shape[-1] or b.shape != (out_features, a.shape[0]):
        raise ValueError(
            f"lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} must be (rank, {x.shape[-1]}) and "
            f"({out_features}, rank) for a weight of shape {tuple(weight.shape)}."
        )
    for name, vector in (("bias", member.bias), ("dora_magnitude", member.dora_magnitude)):
        if vector is not None and vector.numel() != out_features:
            raise ValueError(f"{name} has {vector.numel()} elements; the weight has {out_features} output features.")
    if isinstance(weight, FP8Weight):
        check_fp8_input(x, dtype)
        if member.dora_magnitude is not None:
            raise ValueError("DoRA needs the norms of whole weights, and FP8 has none. Leave the weight in bf16.")
    if isinstance(weight, Tensor) and weight.dtype != dtype:
        raise ValueError(
            f"x is {dtype} and weight {weight.dtype}; a linear layer needs one dtype. Cast x, or use torch.autocast."
        )


def _member(weights: LoraWeights, column: int) -> Member:
    kept = 1.0 - effective_p(weights.dropout_p)
    seed = 0
    if weights.dropout_p:
        seed = draw_seed() if weights.seed is None else weights.seed
    return Member(column, weights.lora_a.shape[0], weights.scale / kept, weights.dropout_p, seed)


def plan_of(x_TI: Tensor, group: Sequence[LoraWeights], backend: Backend) -> Plan:
    """The members' scalars, and whether the Triton form runs them."""
    members: list[Member] = []
    for weights in group:
        members.append(_member(weights, sum(member.rank for member in members)))
    quantized = tuple(None if isinstance(w.weight, Tensor) else w.weight for w in group)
    # Triton's fp32 product is TF32 or slow; the vendor's GEMM follows torch's precision settings.
    suits = x_TI.dtype in (torch.bfloat16, torch.float16) if backend == "auto" else x_TI.dtype != torch.float64
    padded = len(members) * max(16, *(1 << (member.rank - 1).bit_length() for member in members))
    triton = use_triton(x_TI, backend) and suits and x_TI.numel() > 0 and padded <= MAX_TRITON_RANKS
    return Plan(tuple(members), quantized, triton)


def _run_slice(x_TI: Tensor, group: Sequence[LoraWeights], backend: Backend) -> tuple[Tensor, ...]:
    flat = [
        tensor
        for w in group
        for tensor in (w.weight if isinstance(w.weight, Tensor) else None, w.bias, w.lora_a, w.lora_b)
    ]
    return _LoraLinear.apply(plan_of(x_TI, group, backend), x_TI, *flat)


def _autocast_to(dtype: torch.dtype, group: Sequence[LoraWeights]) -> list[LoraWeights]:
    return [w._replace(weight=w.weight.to(dtype)) if isinstance(w.weight, Tensor) else w for w in group]


@torch._disable_dynamo
def lora_linear_group(x: Tensor, members: Sequence[LoraWeights], *, backend: Backend = "auto") -> list[Tensor]:
    """The outputs (..., out), in order, of linear layers with adapters that read the same x (..., in).

    x: fp32, bf16 or fp16; weights in x's dtype, NF4 or FP8; adapters and biases in any float dtype (used in x's, their
    gradients accumulated in fp32 and returned in their own). Frozen and trained parameters may be mixed. Dropout is a
    pure function of (seed, row, column); a member without a seed draws one from torch's CPU generator. With
    `dora_magnitude` a member is DoRA, as PEFT computes it. Under torch.autocast, x and the weights are cast first.

    Raises ValueError for invalid shapes, dtypes or probabilities.
    """
    if not members:
        return []
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    group = _autocast_to(dtype, members) if autocast else list(members)
    for member in group:
        check_member(x, member, dtype)
    x_TI = x.to(dtype).reshape(-1, x.shape[-1])
    if not autocast:
        return _run_group(x, x_TI, group, backend)
    with torch.autocast(device, enabled=False):
        return _run_group(x, x_TI, group, backend)


def _run_group(x: Tensor, x_TI: Tensor, group: Sequence[LoraWeights], backend: Backend) -> list[Tensor]:
    outputs: dict[int, Tensor] = {}
    plain = [i for i, member in enumerate(group) if member.dora_magnitude is None]
    for begin in range(0, len(plain), MAX_GROUP):
        indices = plain[begin : begin + MAX_GROUP]
        outputs.update(zip(indices, _run_slice(x_TI, [group[i] for i in indices], backend), strict=True))
    for i, member in enumerate(group):
        if member.dora_magnitude is not None:
            outputs[i] = dora_linear(x_TI, member, _member(member, 0))
    return [outputs[i].view(*x.shape[:-1], outputs[i].shape[1]) for i in range(len(group))]


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight | FP8Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    dora_magnitude: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """x W^T + b + scale * dropout(x) A^T B^T for one layer: x (..., in) to (..., out). See `lora_linear_group`."""
    weights = LoraWeights(weight, bias, lora_a, lora_b, scale, dropout_p, dropout_seed, dora_magnitude)
    return lora_linear_group(x, [weights], backend=backend)[0]
