"""Attention within short segments, fp32 on CPU: softmax(scale Q K^T) V by plain products.

PyTorch's attention is built for long rows; up to 128 keys this takes 0.6 to 0.9 of its time. The queries of the N / M
heads that share a key are rows of one product; one gather brings tokens into that layout, another back. The gradients
of a token that is a key at several places are summed on the way. Attention weights are kept for the backward pass if
they are no more than the queries, and recomputed otherwise.

Shapes: T tokens, N heads, M key heads, D head width; per batch c = rows * M products, G = queries * N / M rows, L keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ft_dist_kernels.attention.segments import Segments

LONGEST = 128
"""Most keys of a short segment"""


class Layout(NamedTuple):
    """Rows are (token, head) pairs. queries and keys: the row at each place of all batches; query_of: the place of each
    row; unread: unused places; per batch masks (1, G, L), 0 or -inf, and the sizes of q (c, G) and k (c, L).
    """

    queries: Tensor
    keys: Tensor
    query_of: Tensor
    unread: Tensor
    masks: list[Tensor]
    query_sizes: list[tuple[int, int]]
    key_sizes: list[tuple[int, int]]


def suits(q_TND: Tensor, segments: Segments) -> bool:
    longest = max(shape.longest for shape in segments.shapes)
    return q_TND.device.type == "cpu" and q_TND.dtype == torch.float32 and longest <= LONGEST


def short_attention(
    q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, segments: Segments, *, scale: float, window: int | None
) -> Tensor:
    """q (T, N, D), k and v (T, M, D) -> (T, N, D)."""
    y_TND: Tensor = _ShortAttention.apply(q_TND, k_TMD, v_TMD, segments, scale, window)
    return y_TND


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        heads, kv_heads, width = q_TND.shape[1], k_TMD.shape[1], q_TND.shape[2]
        layout = _layout(segments, heads, kv_heads, window)
        q = _batches(q_TND.reshape(-1, width).index_select(0, layout.queries), layout.query_sizes)
        k = _batches(k_TMD.reshape(-1, width).index_select(0, layout.keys), layout.key_sizes)
        v = _batches(v_TMD.reshape(-1, width).index_select(0, layout.keys), layout.key_sizes)
        y = q_TND.new_empty(len(layout.queries), width)
        weights = []
        for mask_1GL, q_cGD, k_cLD, v_cLD, y_cGD in zip(
            layout.masks, q, k, v, _batches(y, layout.query_sizes), strict=True
        ):
            weights.append(_weights(mask_1GL, q_cGD, k_cLD, scale))
            torch.bmm(weights[-1], v_cLD, out=y_cGD)
        ctx.layout, ctx.scale, ctx.kv_rows = layout, scale, k_TMD.shape[0] * kv_heads
        kept = [w_cGL if w_cGL.shape[2] <= width else None for w_cGL in weights]
        ctx.save_for_backward(*q, *k, *v, *kept)
        return y.index_select(0, layout.query_of).view(q_TND.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TND: Tensor) -> tuple[Tensor | None, ...]:
        layout, (tokens, _, width), saved = ctx.layout, dy_TND.shape, ctx.saved_tensors
        count = len(layout.masks)
        q, k, v, weights = (saved[first : first + count] for first in range(0, 4 * count, count))
        dy = dy_TND.reshape(-1, width).index_select(0, layout.queries)
        if len(layout.unread):
            dy.index_fill_(0, layout.unread, 0)
        dq, dk, dv = torch.empty_like(dy), dy.new_empty(len(layout.keys), width), dy.new_empty(len(layout.keys), width)
        into_q, given = _batches(dq, layout.query_sizes), _batches(dy, layout.query_sizes)
        into_k, into_v = _batches(dk, layout.key_sizes), _batches(dv, layout.key_sizes)
        for i, (kept_cGL, q_cGD, k_cLD, v_cLD, dy_cGD) in enumerate(zip(weights, q, k, v, given, strict=True)):
            weights_cGL = _weights(layout.masks[i], q_cGD, k_cLD, ctx.scale) if kept_cGL is None else kept_cGL
            torch.bmm(weights_cGL.transpose(1, 2), dy_cGD, out=into_v[i])
            d_weights_cGL = torch.bmm(dy_cGD, v_cLD.transpose(1, 2))
            d_scores_cGL = torch._softmax_backward_data(d_weights_cGL, weights_cGL, -1, dy.dtype).mul_(ctx.scale)
            torch.bmm(d_scores_cGL, k_cLD, out=into_q[i])
            torch.bmm(d_scores_cGL.transpose(1, 2), q_cGD, out=into_k[i])
        dq_TND = dq.index_select(0, layout.query_of).view(dy_TND.shape)
        dk_TMD, dv_TMD = (_sum_to_rows(x, layout.keys, ctx.kv_rows).view(tokens, -1, width) for x in (dk, dv))
        return dq_TND, dk_TMD, dv_TMD, None, None, None


def _weights(mask_1GL: Tensor, q_cGD: Tensor, k_cLD: Tensor, scale: float) -> Tensor:
    return torch.softmax(torch.baddbmm(mask_1GL, q_cGD, k_cLD.transpose(1, 2), alpha=scale), -1)


def _sum_to_rows(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count, D): the sum of the x that belong to each row, in stored order: the gradient of a row lookup. On CPU
    index_add_ makes one call per row."""
    return torch.ops.aten.embedding_dense_backward(x, rows, count, -1, False)


def _batches(x: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Rows (places, D) of all batches, each as (c, rows of a product, D)."""
    if len(sizes) == 1:
        return [x.view(*sizes[0], -1)]
    return [part.view(*size, -1) for part, size in zip(x.split([c * rows for c, rows in sizes]), sizes, strict=True)]


def _layout(segments: Segments, heads: int, kv_heads: int, window: int | None) -> Layout:
    """Computed once for all layers."""
    key = (_layout, heads, kv_heads, window)
    if key not in segments.laid:
        segments.laid[key] = _lay(segments, heads, kv_heads, window)
    layout: Layout = segments.laid[key]
    return layout


def _lay(segments: Segments, heads: int, kv_heads: int, window: int | None) -> Layout:
    group, shapes = heads // kv_heads, segments.shapes
    is_read = torch.ones_like(segments.queries, dtype=torch.bool).index_fill_(0, segments.unread, False)
    per_query, per_key = [s.rows * s.queries for s in shapes], [s.rows * s.longest for s in shapes]
    query_rows, key_rows, read, masks = [], [], [], []
    for shape, queried, keyed, used in zip(
        shapes, segments.queries.split(per_query), segments.keys.split(per_key), is_read.split(per_query), strict=True
    ):
        # (b, N, l) = (b M, N / M l): heads that share a key become adjacent
        query_rows.append((queried.view(shape.rows, 1, -1) * heads + torch.arange(heads)[:, None]).flatten())
        key_rows.append((keyed.view(shape.rows, 1, -1) * kv_heads + torch.arange(kv_heads)[:, None]).flatten())
        read.append(used.view(shape.rows, 1, -1).expand(-1, heads, -1).flatten())
        seen = shape.seen(window)
        masks.append(torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).repeat(1, group, 1))
    queries, is_read = torch.cat(query_rows), torch.cat(read)
    places = torch.nonzero(is_read).squeeze(1)
    return Layout(
        queries=queries,
        keys=torch.cat(key_rows),
        query_of=torch.empty(len(places), dtype=torch.int64).index_copy_(0, queries[places], places),
        unread=torch.nonzero(~is_read).squeeze(1),
        masks=masks,
        query_sizes=[(s.rows * kv_heads, group * s.queries) for s in shapes],
        key_sizes=[(s.rows * kv_heads, s.longest) for s in shapes],
    )
