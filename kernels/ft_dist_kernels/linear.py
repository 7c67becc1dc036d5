"""Linear layers that read the same x, for fp32 on CPU, with oneDNN's products (products.py has the speed-ups).

    y_i = x W_i^T + b_i,  dx = sum of dy_i W_i,  dW_i = dy_i^T x,  db_i = sum over rows of dy_i

The products accumulate the gradient of x. Elsewhere torch's layer is as fast.

Shapes: T tokens (any leading shape), I in, O out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft_dist_kernels.products import matmul, sum_products, takes_onednn, transposed_product


def linear_group(x: Tensor, members: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """Outputs (..., O) of every (weight (O, I), bias (O,) or None) on x (..., I); all of one dtype.

    Raises ValueError for mismatched shapes.
    """
    for weight, _ in members:
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; x has {x.shape[-1]} features, so it must be (out, "
                f"{x.shape[-1]}). An empty weight is one that ZeRO-3 has partitioned: call inside its module."
            )
    flat = [tensor for member in members for tensor in member]
    outputs = _run(x.reshape(-1, x.shape[-1]), *flat)
    return [y_TO.view(*x.shape[:-1], y_TO.shape[1]) for y_TO in outputs]


def linear_group_reference(x: Tensor, members: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """The same in plain PyTorch."""
    return [torch.nn.functional.linear(x, weight, bias) for weight, bias in members]


def gains_from_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether this is faster than torch's layer for a layer with this weight."""
    return weight.dim() == 2 and takes_onednn(x.detach().reshape(-1, x.shape[-1]), weight.detach().t())


@torch._disable_dynamo
def _run(x_TI: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _Linears.apply(x_TI, *flat)
    return outputs


class _Linears(torch.autograd.Function):
    """Inputs: x, then weight and bias (or None) of every member."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        outputs = []
        for w_OI, bias in zip(flat[::2], flat[1::2], strict=True):
            y_TO = matmul(x_TI, w_OI.t())
            outputs.append(y_TO if bias is None else y_TO.add_(bias))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_TI, *flat[::2])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        x_TI, *weights = ctx.saved_tensors
        grads: list[Tensor | None] = []
        products = []
        for index, (dy_TO, w_OI) in enumerate(zip(upstream, weights, strict=True)):
            need_w, need_b = ctx.needs_input_grad[1 + 2 * index : 3 + 2 * index]
            if dy_TO is None:
                grads += [None, None]
                continue
            dy_TO = dy_TO if dy_TO.stride(1) == 1 else dy_TO.contiguous()
            products.append((dy_TO, w_OI))
            grads.append(transposed_product(dy_TO, x_TI, w_OI.dtype) if need_w else None)
            grads.append(dy_TO.sum(0) if need_b else None)
        dx_TI = sum_products(products) if ctx.needs_input_grad[0] and products else None
        return dx_TI, *grads
