"""DoRA: a LoRA linear whose output features are rescaled to trained magnitudes.

    c = m / ||W + scale B A||  (row-wise; the norm is a constant in backward)
    Y = c * (X W^T + S B^T) + b                                          without dropout
    Y = X W^T + b + (c - 1) * (Xd W^T) + c * (S B^T),  Xd = X * M / (1 - p)   with dropout, as PEFT 0.21 computes it

Saved for backward: the parameters, X and S. The products for the magnitude's gradient are recomputed in blocks of
rows. Shapes: T tokens, t a block of them, I in, O out, R rank. Source: DoRA (arXiv 2402.09353, section 4.3).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft_dist_kernels.dropout.op import BlockMask, effective_p, masked_copy
from ft_dist_kernels.lora.torch_form import LoraWeights, Member, dense_weight, down_torch, mask_of, wide
from ft_dist_kernels.products import sum_products
from ft_dist_kernels.quantised.nf4_format import NF4Weight

_NORM_ELEMENTS = 1 << 20
_ROWS_CPU, _ROWS_GPU = 1024, 8192


class _Plan(NamedTuple):
    member: Member
    scale: float
    quantized: NF4Weight | None

    @property
    def kept(self) -> float:
        return 1.0 - effective_p(self.member.dropout_p)


def dora_norm(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """||W + scale B A|| of every row, in fp32, without an fp32 copy of W."""
    dtype = wide(weight_OI.dtype)
    norm_O = torch.empty(weight_OI.shape[0], dtype=dtype, device=weight_OI.device)
    step = max(1, _NORM_ELEMENTS // max(weight_OI.shape[1], 1))
    for top in range(0, norm_O.numel(), step):
        block = slice(top, top + step)
        merged = torch.addmm(weight_OI[block].to(dtype), b_OR[block].to(dtype), a_RI.to(dtype), alpha=scale)
        torch.linalg.vector_norm(merged, dim=1, out=norm_O[block])
    return norm_O


def _block_rows(x_TI: Tensor) -> int:
    return max(1, min(x_TI.shape[0], _ROWS_CPU if x_TI.device.type == "cpu" else _ROWS_GPU))


def _row_blocks(x_TI: Tensor) -> list[slice]:
    step = _block_rows(x_TI)
    return [slice(top, min(top + step, x_TI.shape[0])) for top in range(0, x_TI.shape[0], step)]


def _mask(plan: _Plan, x_TI: Tensor) -> BlockMask | None:
    return mask_of(x_TI, plan.member, _block_rows(x_TI))


def _scaled_part(base_tO: Tensor | None, x_tI: Tensor, w_OI: Tensor, s_tR: Tensor, b_OR: Tensor) -> Tensor:
    """The factor of c: the base product (computed here unless given) + S B^T."""
    if base_tO is None:
        return sum_products([(s_tR, b_OR.t()), (x_tI, w_OI.t())])
    return sum_products([(s_tR, b_OR.t())], out=base_tO.clone())


def _masked_base(plan: _Plan, x_tI: Tensor, keep: Tensor | None, w_OI: Tensor) -> Tensor | None:
    """Xd W^T of a block of rows; None without dropout."""
    if keep is None:
        return None
    return sum_products([(masked_copy(x_tI, keep), w_OI.t())], alpha=1.0 / plan.kept)


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, x_TI: Tensor, weight: Any, bias: Any, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor
    ) -> Tensor:
        w_OI = dense_weight(weight if plan.quantized is None else plan.quantized, x_TI.dtype)
        a_RI, b_OR = lora_a.to(x_TI.dtype), lora_b.to(x_TI.dtype)
        norm_O = dora_norm(w_OI, lora_a, lora_b, plan.scale)
        c_O = magnitude.to(norm_O.dtype).view(-1) / norm_O
        s_TR = down_torch(x_TI, [a_RI], [plan.member])
        y_TO = x_TI.new_empty(x_TI.shape[0], w_OI.shape[0])
        mask = _mask(plan, x_TI)
        for block in _row_blocks(x_TI):
            keep = None if mask is None else mask.bits(block)
            base_tO = _masked_base(plan, x_TI[block], keep, w_OI)
            y_tO = _scaled_part(base_tO, x_TI[block], w_OI, s_TR[block], b_OR).to(c_O.dtype)
            y_tO.mul_(c_O)
            if base_tO is not None:
                y_tO.sub_(base_tO).add_(sum_products([(x_TI[block], w_OI.t())]))
            if bias is not None:
                y_tO.add_(bias)
            y_TO[block] = y_tO
        ctx.plan, ctx.bias_dtype = plan, None if bias is None else bias.dtype
        ctx.save_for_backward(x_TI, s_TR, norm_O, weight, lora_a, lora_b, magnitude)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        with torch.autocast(dy_TO.device.type, enabled=False):
            return None, *_backward(ctx, dy_TO)


def _backward(ctx: Any, dy_TO: Tensor) -> list[Tensor | None]:
    x_TI, s_TR, norm_O, weight, lora_a, lora_b, magnitude = ctx.saved_tensors
    plan, (need_x, need_w, need_bias, need_a, need_b, need_m) = ctx.plan, ctx.needs_input_grad[1:]
    w_OI = dense_weight(weight if plan.quantized is None else plan.quantized, x_TI.dtype)
    a_RI, b_OR, dtype = lora_a.to(x_TI.dtype), lora_b.to(x_TI.dtype), norm_O.dtype
    c_O = magnitude.to(dtype).view(-1) / norm_O

    def zeros(like: Tensor, needed: bool) -> Tensor | None:
        return torch.zeros(like.shape, dtype=dtype, device=like.device) if needed else None

    dw, da, db, dc = zeros(w_OI, need_w), zeros(lora_a, need_a), zeros(lora_b, need_b), zeros(norm_O, need_m)
    dx_TI = torch.empty_like(x_TI) if need_x else None
    mask = _mask(plan, x_TI)
    for block in _row_blocks(x_TI):
        x_tI, dy_tO = x_TI[block], dy_TO[block]
        keep = None if mask is None else mask.bits(block)
        if dc is not None:
            base_tO = _masked_base(plan, x_tI, keep, w_OI)
            scaled_part_tO = _scaled_part(base_tO, x_tI, w_OI, s_TR[block], b_OR)
            dc.add_((scaled_part_tO.to(dtype) * dy_tO).sum(0))
        scaled_tO = (dy_tO * c_O).to(x_TI.dtype)
        masked_tI = x_tI if keep is None else masked_copy(x_tI, keep)
        ds_tR = sum_products([(scaled_tO, b_OR)], alpha=plan.member.alpha)
        if db is not None:
            db.addmm_(scaled_tO.t().to(dtype), s_TR[block].to(dtype))
        if da is not None:
            da.addmm_(ds_tR.t().to(dtype), masked_tI.to(dtype))
        # Without dropout the base product is scaled by c; with it, by 1 on X and by c - 1 on Xd.
        masked_dy_tO = scaled_tO if keep is None else ((dy_tO * (c_O - 1.0)) / plan.kept).to(x_TI.dtype)
        if dw is not None:
            dw.addmm_(masked_dy_tO.t().to(dtype), masked_tI.to(dtype))
            if keep is not None:
                dw.addmm_(dy_tO.t().to(dtype), x_tI.to(dtype))
        if dx_TI is not None:
            part = sum_products([(ds_tR, a_RI), (masked_dy_tO, w_OI)])
            dx_TI[block] = part if keep is None else sum_products([(dy_tO, w_OI)], out=masked_copy(part, keep))
    d_bias = dy_TO.sum(0, dtype=dtype).to(ctx.bias_dtype) if need_bias else None
    dm = None if dc is None else (dc / norm_O).view(magnitude.shape).to(magnitude.dtype)
    return [
        dx_TI,
        None if dw is None else dw.to(weight.dtype),
        d_bias,
        None if da is None else da.to(lora_a.dtype),
        None if db is None else db.to(lora_b.dtype),
        dm,
    ]


def dora_linear(x_TI: Tensor, weights: LoraWeights, member: Member) -> Tensor:
    """(T, I) to (T, O); `weights.dora_magnitude` is set. `lora_linear` validates and calls this."""
    quantized = weights.weight if isinstance(weights.weight, NF4Weight) else None
    return _DoraLinear.apply(
        _Plan(member, weights.scale, quantized),
        x_TI,
        None if quantized is not None else weights.weight,
        weights.bias,
        weights.lora_a,
        weights.lora_b,
        weights.dora_magnitude,
    )
