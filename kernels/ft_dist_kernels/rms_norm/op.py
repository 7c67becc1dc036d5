"""Root mean square layer normalisation, with or without the residual addition before it.

    s = x + residual  (rounded to x's dtype; s = x without a residual)
    n = s / sqrt(mean(s^2) + eps)  in fp32
    y = n (weight + offset)

Llama, Mistral, Qwen and Phi-3 round n to x's dtype before the weight (`cast_before_weight=True`, offset 0); Gemma
multiplies by 1 + weight in fp32 and rounds once (`cast_before_weight=False, offset=1.0`).

Backward, with g = dy (weight + offset) in fp32 and r = 1 / sqrt(mean(s^2) + eps):

    ds = r (g - n mean(g n)) + gradient of s itself,  dx = dresidual = ds,  dweight = sum over rows of dy n

With `with_sum` s is an output too, with or without a residual: the gradient of its further use (the residual stream of
a decoder layer) goes through this backward pass, which adds it, so autograd need not.

dweight is summed in two stages in a fixed order (partial sums of blocks of rows, then their sum): no atomics. A frozen
weight skips it. Upstream gradients are never overwritten: autograd may pass the same tensor to another branch.

Shapes: T rows (any leading shape), H width.
Source: Zhang and Sennrich (arXiv 1910.07467).
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.backend import Backend, use_triton
from ft_dist_kernels.tiles import empty_with_spare, tiles


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = ...,
    cast_before_weight: bool = ...,
    residual: None = ...,
    with_sum: Literal[False] = ...,
    spare: int = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = ...,
    cast_before_weight: bool = ...,
    residual: Tensor,
    with_sum: bool = ...,
    spare: int = ...,
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = ...,
    cast_before_weight: bool = ...,
    residual: Tensor | None = ...,
    with_sum: Literal[True],
    spare: int = ...,
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = ...,
    cast_before_weight: bool = ...,
    residual: Tensor | None = ...,
    with_sum: bool = ...,
    spare: int = ...,
    backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = True,
    residual: Tensor | None = None,
    with_sum: bool = False,
    spare: int = 0,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension of x (..., H), by weight (H,); y has x's dtype.

    With a residual (shape and dtype of x) returns (y, x + residual), both differentiable; `with_sum` without a residual
    returns (y, x). With `spare` y is the first H columns of a buffer whose rows are longer by `spare` columns, which
    are not written. x is fp32, bf16 or fp16; weight may have another floating dtype. Raises ValueError for unsupported
    shapes and dtypes.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x has dtype {x.dtype}; it must be fp32, bf16 or fp16. Use x.float().")
    if x.dim() < 1 or weight.shape != x.shape[-1:] or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}; x {tuple(x.shape)} needs a floating one of shape "
            f"{tuple(x.shape[-1:])}. Under ZeRO-3 gather it first."
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)} and x {x.dtype} {tuple(x.shape)}; they must agree."
        )
    if not eps >= 0:
        raise ValueError(f"eps={eps} must be >= 0. Use the model's value, such as 1e-6.")
    with_sum = with_sum or residual is not None
    scalars = float(eps), float(offset), cast_before_weight, with_sum, spare
    y, total = _run(x, residual, weight, *scalars, use_triton(x, backend))
    return (y, total) if with_sum else y


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = True,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in plain PyTorch, as in transformers' modules."""
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast_before_weight:
        y = (weight + offset if offset else weight) * normed.to(x.dtype)
    else:
        y = normed * (offset + weight.to(wide.dtype))
    y = y.to(x.dtype)
    return y if residual is None else (y, total)


@torch._disable_dynamo
def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _RmsNorm.apply(*arguments)


def _rows(tensor: Tensor) -> Tensor:
    """(T, H) with unit stride along H; a view wherever one exists."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        offset: float,
        cast_before_weight: bool,
        with_sum: bool,
        spare: int,
        triton: bool,
    ) -> tuple[Tensor, Tensor | None]:
        x_TH, residual_TH = _rows(x), None if residual is None else _rows(residual)
        y, y_TH = empty_with_spare(x.shape, spare, like=x)
        sum_TH = x_TH if residual is None else torch.empty(x_TH.shape, dtype=x.dtype, device=x.device)
        rstd_T = torch.empty(x_TH.shape[0], dtype=torch.float32, device=x.device)
        forward = _triton_kernels().forward_triton if triton else forward_torch
        forward(x_TH, residual_TH, weight, y_TH, sum_TH, rstd_T, eps, offset, cast_before_weight)
        ctx.save_for_backward(sum_TH, rstd_T, weight)
        ctx.offset, ctx.cast_before_weight, ctx.triton = offset, cast_before_weight, triton
        ctx.set_materialize_grads(False)
        total = None
        if with_sum:
            total = x if residual is None else sum_TH.view(x.shape)
        return y, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        sum_TH, rstd_T, weight = ctx.saved_tensors
        want_x, want_residual, want_weight = ctx.needs_input_grad[:3]
        if dy is None:
            dweight = torch.zeros_like(weight) if want_weight else None
            return dsum if want_x else None, dsum if want_residual else None, dweight, *[None] * 6
        dx_TH = torch.empty(sum_TH.shape, dtype=sum_TH.dtype, device=sum_TH.device)
        backward = _triton_kernels().backward_triton if ctx.triton else backward_torch
        dweight = backward(
            sum_TH,
            rstd_T,
            weight,
            _rows(dy),
            None if dsum is None else _rows(dsum),
            dx_TH,
            ctx.offset,
            ctx.cast_before_weight,
            want_weight,
        )
        dx = dx_TH.view(dy.shape)
        return dx if want_x else None, dx if want_residual else None, dweight, *[None] * 6


def forward_torch(
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
    scale_H, width = weight_H.float() + offset if offset else weight_H.float(), x_TH.shape[1]
    if residual_TH is not None:
        for x, residual, total in tiles(width, x_TH, residual_TH, sum_TH):
            torch.add(x, residual, out=total)
    for total, rstd_t, y in tiles(width, sum_TH, rstd_T, y_TH):
        wide = total.float()
        torch.mean(wide.square(), -1, out=rstd_t).add_(eps).rsqrt_()
        normed = wide * rstd_t[:, None]
        if cast_before_weight and y.dtype != normed.dtype:
            normed = normed.to(y.dtype).float()
        torch.mul(normed, scale_H, out=y)


def backward_torch(
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
    scale_H, width = weight_H.float() + offset if offset else weight_H.float(), sum_TH.shape[1]
    dweight_H = torch.zeros_like(scale_H) if want_weight else None
    more = [] if dsum_TH is None else [dsum_TH]
    for total, rstd_t, dy_tH, dx, *dsum in tiles(width, sum_TH, rstd_T, dy_TH, dx_TH, *more):
        dy, rstd_t1 = dy_tH.float(), rstd_t[:, None]
        normed = total.float() * rstd_t1
        if dweight_H is not None:
            rounded = normed.to(total.dtype) if cast_before_weight else normed
            dweight_H.add_((rounded * dy).sum(0))
        g = dy * scale_H
        g.addcmul_(normed, torch.linalg.vecdot(g, normed)[:, None], value=-1 / width)
        if dsum:
            dx.copy_(g.mul_(rstd_t1).add_(dsum[0]))
        else:
            torch.mul(g, rstd_t1, out=dx)
    return None if dweight_H is None else dweight_H.to(weight_H.dtype)


def _triton_kernels() -> Any:
    from ft_dist_kernels.rms_norm import kernels as rms_norm_kernels

    return rms_norm_kernels


def aot_cases(chip: Chip) -> list[AotCase]:
    """Llama-3-8B, Gemma 3, a head norm of width 128, and the looped form of very wide models, bf16."""
    return _triton_kernels().aot_cases(chip)
