"""One linear layer, several LoRA adapters: every row of x names the adapter that it uses.

    y_t = W x_t + b + scale_k B_k A_k (m_t * x_t) / (1 - p_k),   k = rows[t]; k = -1 is the layer alone

Rows are grouped by adapter; S of each group is saved, and x once. A row's dropout mask is that of its place in the
whole x, whatever its neighbours use. The products run in PyTorch on every device.

Shapes: T tokens, t those of one adapter, I in, O out, R rank.
Source: batched adapters as in PEFT's `adapter_names` (inference only there; here with gradients).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft_dist_kernels.dropout.op import draw_seed, effective_p, keep_bits, masked_copy
from ft_dist_kernels.lora.torch_form import dense_weight, wide
from ft_dist_kernels.products import sum_products, transposed_product
from ft_dist_kernels.quantised.nf4 import NF4Weight


class LoraAdapter(NamedTuple):
    """lora_a (R, I), lora_b (O, R), in any float dtype; ranks may differ between adapters."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float = 1.0
    dropout_p: float = 0.0
    seed: int | None = None


class _Part(NamedTuple):
    """The rows of one adapter, in ascending order."""

    rows: Tensor
    alpha: float
    dropout_p: float
    seed: int

    def take(self, x_TI: Tensor) -> Tensor:
        x_tI = x_TI.index_select(0, self.rows)
        return masked_copy(x_tI, self.keep(x_tI)) if self.dropout_p else x_tI

    def keep(self, x_tI: Tensor) -> Tensor:
        return keep_bits(self.rows, x_tI.shape[1], self.dropout_p, self.seed, x_tI.dtype)


class _LoraAdapters(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parts: Sequence[_Part],
        quantized: NF4Weight | None,
        x_TI: Tensor,
        weight: Any,
        bias: Any,
        *factors: Tensor,
    ) -> Tensor:
        w_OI = dense_weight(weight if quantized is None else quantized, x_TI.dtype)
        y_TO = sum_products([(x_TI, w_OI.t())], bias_N=None if bias is None else bias.to(x_TI.dtype))
        lows = []
        for part, a_RI, b_OR in zip(parts, factors[::2], factors[1::2], strict=True):
            s_tR = sum_products([(part.take(x_TI), a_RI.to(x_TI.dtype).t())], alpha=part.alpha)
            chosen_tO = sum_products([(s_tR, b_OR.to(x_TI.dtype).t())], out=y_TO.index_select(0, part.rows))
            y_TO.index_copy_(0, part.rows, chosen_tO)
            lows.append(s_tR)
        ctx.parts, ctx.quantized, ctx.device = parts, quantized, x_TI.device.type
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x_TI, weight, *lows, *factors)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> Any:
        with torch.autocast(ctx.device, enabled=False):
            return None, None, *_backward(ctx, dy_TO)


def _backward(ctx: Any, dy_TO: Tensor) -> list[Tensor | None]:
    x_TI, weight, *saved = ctx.saved_tensors
    count = len(ctx.parts)
    lows, factors = saved[:count], saved[count:]
    need_x, need_w, need_bias, *need_factors = ctx.needs_input_grad[2:]
    dx_TI = None
    if need_x:
        w_OI = dense_weight(weight if ctx.quantized is None else ctx.quantized, x_TI.dtype)
        dx_TI = sum_products([(dy_TO, w_OI)])
    grads: list[Tensor | None] = [None] * len(factors)
    for i, (part, s_tR) in enumerate(zip(ctx.parts, lows, strict=True)):
        a_RI, b_OR = factors[2 * i], factors[2 * i + 1]
        dy_tO = dy_TO.index_select(0, part.rows)
        if need_factors[2 * i + 1]:
            grads[2 * i + 1] = transposed_product(dy_tO, s_tR, b_OR.dtype)
        ds_tR = sum_products([(dy_tO, b_OR.to(x_TI.dtype))], alpha=part.alpha)
        if need_factors[2 * i]:
            grads[2 * i] = transposed_product(ds_tR, part.take(x_TI), a_RI.dtype)
        if dx_TI is not None:
            low_tI = sum_products([(ds_tR, a_RI.to(x_TI.dtype))])
            if part.dropout_p:
                low_tI = masked_copy(low_tI, part.keep(low_tI))
            dx_TI.index_copy_(0, part.rows, dx_TI.index_select(0, part.rows).add_(low_tI))
    dw = transposed_product(dy_TO, x_TI, weight.dtype) if need_w else None
    d_bias = dy_TO.sum(0, dtype=wide(dy_TO.dtype)).to(ctx.bias_dtype) if need_bias else None
    return [dx_TI, dw, d_bias, *grads]


def _checked(x: Tensor, weight: Tensor | NF4Weight, adapters: Sequence[LoraAdapter], rows: Tensor) -> None:
    if rows.shape != x.shape[:-1] or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"rows is {rows.dtype} {tuple(rows.shape)}; it must be int32 or int64 of shape {tuple(x.shape[:-1])}: one "
            "adapter index for every row of x, or -1 for none."
        )
    if rows.numel() and (int(rows.min()) < -1 or int(rows.max()) >= len(adapters)):
        raise ValueError(
            f"rows holds indices from {int(rows.min())} to {int(rows.max())}; {len(adapters)} adapters allow -1 (none) "
            f"to {len(adapters) - 1}."
        )
    for index, adapter in enumerate(adapters):
        a, b = adapter.lora_a, adapter.lora_b
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != x.shape[-1] or b.shape != (weight.shape[0], a.shape[0]):
            raise ValueError(
                f"adapters[{index}] has lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)}; a weight of shape "
                f"{tuple(weight.shape)} needs (rank, {x.shape[-1]}) and ({weight.shape[0]}, rank)."
            )
    if isinstance(weight, Tensor) and weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; a linear layer needs one dtype. Cast x.")


@torch._disable_dynamo
def lora_linear_adapters(
    x: Tensor,
    weight: Tensor | NF4Weight,
    adapters: Sequence[LoraAdapter],
    rows: Tensor,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """x (..., I) to (..., O); `rows` (...) int32 or int64 holds the adapter of every row, -1 for none.

    Gradients, dtypes and dropout as in `lora_linear_group`; an adapter that no row uses gets gradients of zeros.
    Raises ValueError for shapes, dtypes or indices that do not fit.
    """
    _checked(x, weight, adapters, rows)
    flat = rows.reshape(-1)
    parts = []
    for index, adapter in enumerate(adapters):
        seed = 0
        if adapter.dropout_p:
            seed = draw_seed() if adapter.seed is None else adapter.seed
        alpha = adapter.scale / (1.0 - effective_p(adapter.dropout_p))
        parts.append(_Part((flat == index).nonzero().view(-1), alpha, adapter.dropout_p, seed))
    quantized = weight if isinstance(weight, NF4Weight) else None
    factors = [factor for adapter in adapters for factor in (adapter.lora_a, adapter.lora_b)]
    with torch.autocast(x.device.type, enabled=False):
        y_TO = _LoraAdapters.apply(
            parts, quantized, x.reshape(-1, x.shape[-1]), None if quantized is not None else weight, bias, *factors
        )
    return y_TO.view(*x.shape[:-1], y_TO.shape[1])
