"""Causal attention within segments (the samples of packed rows), without a mask or work across their boundaries.

On a GPU one variable-length call serves all segments (`ragged.py`). On CPU `segments.py` lays the tokens out so that
every batch is plain causal attention: short segments in fp32 use `short.py`, the rest PyTorch's attention.

Shapes: B rows, S positions, T = B S tokens, P places over all batches, N heads, M key heads, D head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ft_dist_kernels.attention.ragged import ragged_attention
from ft_dist_kernels.attention.ragged_segments import AnySegments, RaggedSegments
from ft_dist_kernels.attention.segments import Segments
from ft_dist_kernels.attention.short import short_attention, suits


@torch._disable_dynamo
def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: AnySegments,
    *,
    scale: float,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """q (B, N, S, D), k and v (B, M, S, D), N a multiple of M; returns (B, S, N, D).

    A token attends to itself and the earlier tokens of its segment, with a `window` to at most that many. Raises
    ValueError if the segments are for CPU but the tensors are not.
    """
    q_TND, k_TMD, v_TMD = (_tokens_first(x) for x in (q, k, v))
    options: dict[str, Any] = {"scale": scale, "window": window}
    if isinstance(segments, RaggedSegments):
        y_TND = ragged_attention(q_TND, k_TMD, v_TMD, segments, **options, dropout_p=dropout_p)
    elif q.device.type != "cpu":
        raise ValueError(f"segments for cpu cannot be used on {q.device}. Get them from segments_for.")
    elif suits(q_TND, segments) and not dropout_p:
        y_TND = short_attention(q_TND, k_TMD, v_TMD, segments, **options)
    else:
        y_TND = _by_batches(q_TND, k_TMD, v_TMD, segments, **options, dropout_p=dropout_p)
    return y_TND.view(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _by_batches(
    q_TND: Tensor,
    k_TMD: Tensor,
    v_TMD: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    dropout_p: float,
) -> Tensor:
    """PyTorch's attention, one call per batch."""
    _, heads, width = q_TND.shape
    shapes = segments.shapes
    per_key = [shape.rows * shape.longest for shape in shapes]
    of_queries = _spread_queries(q_TND, segments).split([shape.rows * shape.queries for shape in shapes])
    of_keys, of_values = (_spread_keys(x, segments).split(per_key) for x in (k_TMD, v_TMD))
    outputs = []
    for shape, *parts in zip(shapes, of_queries, of_keys, of_values, strict=True):
        q_bnsd, k_bmsd, v_bmsd = (part.view(shape.rows, -1, *part.shape[1:]).transpose(1, 2) for part in parts)
        # None: each query sees the keys up to its own, the first query the first key
        plain = shape.begin == 0 and (window is None or shape.longest <= window)
        mask = None if plain else shape.seen(window)
        y_bnsd = F.scaled_dot_product_attention(
            q_bnsd,
            k_bmsd,
            v_bmsd,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=k_TMD.shape[1] != heads,
        )
        outputs.append(y_bnsd.transpose(1, 2).reshape(-1, heads, width))
    y_PND = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _collect(y_PND, segments)


def segment_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """The same with a mask over whole rows, in plain PyTorch."""
    segment = (position_ids == 0).cumsum(1)
    index = torch.arange(q.shape[2], device=q.device)
    distance = index[:, None] - index
    seen = (segment[:, :, None] == segment[:, None]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeats, 1).transpose(2, 3) * scale
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return (weights @ v.repeat_interleave(repeats, 1)).transpose(1, 2)


def _tokens_first(x: Tensor) -> Tensor:
    """(B, N, S, D) -> (T, N, D), without a copy if the heads of a token are adjacent in memory."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _spread_queries(x_TND: Tensor, segments: Segments) -> Tensor:
    """Tokens (T, N, D) -> places (P, N, D). Each token is a query once, so it receives one gradient."""
    if segments.in_order:
        return x_TND
    return _Rearrange.apply(x_TND, segments.queries, segments.query_of, None, None)


def _spread_keys(x_TMD: Tensor, segments: Segments) -> Tensor:
    """Tokens (T, M, D) -> places (P, M, D); the gradients of copies are summed."""
    if segments.in_order:
        return x_TMD
    return _Rearrange.apply(x_TMD, segments.keys, segments.key_of, segments if len(segments.copies) else None, None)


def _collect(y_PND: Tensor, segments: Segments) -> Tensor:
    """Places (P, N, D) -> tokens (T, N, D)."""
    if segments.in_order:
        return y_PND
    return _Rearrange.apply(y_PND, segments.query_of, segments.queries, None, segments.unread)


class _Rearrange(torch.autograd.Function):
    """Rows of x in the order of `index`. `inverse`: the first place of each row; the segments of `copies`: the further
    ones; `unread`: the rows of x that the result omits, since such a query would still send gradients to its segment's
    keys."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, copies: Segments | None, unread: Tensor | None
    ) -> Tensor:
        ctx.inverse, ctx.copies, ctx.unread = inverse, copies, unread
        return x.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        gathered = grad.index_select(0, ctx.inverse)
        if ctx.unread is not None:
            gathered.index_fill_(0, ctx.unread, 0)
        if ctx.copies is not None:
            _add_copies(gathered, grad, ctx.copies)
        return gathered, None, None, None, None


def _add_copies(gathered: Tensor, grad: Tensor, segments: Segments) -> None:
    """Add the gradients of copies to those of their tokens: in fp32, in a fixed order."""
    sums = gathered.index_select(0, segments.shared).float()
    values = grad.index_select(0, segments.copies).float()
    sums.index_add_(0, segments.copied, values)
    gathered.index_copy_(0, segments.shared, sums.to(grad.dtype))
