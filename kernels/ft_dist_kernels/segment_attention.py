"""Causal attention inside segments (the samples of packed rows), with neither a mask nor work across their borders.

A mask that keeps the samples of a row apart costs the whole row's square: 25 samples of 40 tokens in a row of 1,000
would take 25 times the arithmetic that they need, and mask every fast path of PyTorch's attention away. Here segments
of like length are laid side by side as a batch, (segments, longest, heads, width); each batch is plain causal
attention, which padding after a segment's end cannot touch.

Segments that begin alike (a system prompt) can share tokens: what a token's layers compute depends on the tokens before
it alone, so that one computation serves all of them, and its gradient is the sum of theirs. Such a token lies at
several places; it is queried at the first, and is a key and a value at all.

Shapes: B rows, S positions, T = B S tokens, P places of all batches together, C copies, N heads, D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 32
"""Segments up to this long share a batch: attention over so few tokens costs less than another call"""
WHOLE = 64
"""Up to this length fp32 attention on CPU keeps its weights for the backward pass, which are no more than its output:
0.5 to 0.7 of the time of PyTorch's own, which is made for long rows"""


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each token lies among the batches.

    token_of (P,): the token at each place, some token of the same rows where no segment reaches; place_of (T,): the
    first place of each token; shared: the tokens with more places than one; copies (C,): those further places, and
    copied (C,): of which of the shared tokens; unread: the places that no token's output is taken from, without a token
    or copies; shapes: segments and length of each batch, in order. `in_order`: the places are the tokens.
    """

    token_of: Tensor
    place_of: Tensor
    shared: Tensor
    copies: Tensor
    copied: Tensor
    unread: Tensor
    shapes: tuple[tuple[int, int], ...]
    in_order: bool

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Segments":
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Segments":
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Segments":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


def find_segments(position_ids: Tensor) -> Segments:
    """position_ids (B, S) int64 on CPU, 0 where a segment begins; every row begins one."""
    flat = position_ids.reshape(-1)
    starts = torch.nonzero(flat == 0).squeeze(1)
    lengths = torch.diff(starts, append=starts.new_tensor([flat.numel()]))
    return lay_segments(torch.arange(flat.numel()), lengths)


def lay_segments(tokens: Tensor, lengths: Tensor) -> Segments:
    """tokens (sum of lengths,) int64 on CPU: the token at each position of the segments, end to end; every token from 0
    to the largest comes at least once. lengths: of the segments, all above 0."""
    starts = torch.cumsum(lengths, 0) - lengths
    order = torch.argsort(lengths, descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    positions, valid, shapes, first = [], [], [], 0
    while first < len(lengths):
        longest = int(lengths[first])
        shortest = 1 if 1 < longest <= SHORT else longest // 2
        count = int((lengths[first:] > shortest).sum())
        places = torch.arange(longest).expand(count, longest)
        reached = places < lengths[first : first + count, None]
        positions.append((starts[first : first + count, None] + places * reached).flatten())
        valid.append(reached.flatten())
        shapes.append((count, longest))
        first += count
    token_of, reached = tokens[torch.cat(positions)], torch.cat(valid)
    places = torch.nonzero(reached).squeeze(1)
    at_places = token_of[places]
    place_of = places.new_full((int(tokens.max()) + 1,), len(token_of)).scatter_reduce_(0, at_places, places, "amin")
    is_copy = place_of[at_places] != places
    by_token, order = torch.sort(at_places[is_copy], stable=True)
    copies = places[is_copy][order]
    shared, copied = torch.unique_consecutive(by_token, return_inverse=True)
    read = torch.zeros_like(reached).index_fill_(0, place_of, True)
    return Segments(
        token_of=token_of,
        place_of=place_of,
        shared=shared,
        copies=copies,
        copied=copied,
        unread=torch.nonzero(~read).squeeze(1),
        shapes=tuple(shapes),
        in_order=torch.equal(place_of, torch.arange(len(token_of))),
    )


@torch._disable_dynamo
def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """q (B, N, S, D), k and v (B, N_kv, S, D), N a multiple of N_kv; returns (B, S, N, D).

    A token sees the tokens before it in its segment and itself, with a `window` only that many of them.
    """
    batch, heads, positions, width = q.shape
    sizes = [count * longest for count, longest in segments.shapes]
    # a copy's output is not taken, so that no gradient comes back to its query
    spread = [_spread(_tokens_first(x), segments, summed=x is not q).split(sizes) for x in (q, k, v)]
    outputs = []
    for (count, longest), *parts in zip(segments.shapes, *spread, strict=True):
        if q.device.type == "cpu" and q.dtype == torch.float32 and longest <= min(WHOLE, width) and not dropout_p:
            tokens = [part.view(count, longest, *part.shape[1:]) for part in parts]
            outputs.append(_WholeAttention.apply(*tokens, scale, window).reshape(count * longest, heads, width))
            continue
        q_bnsd, k_bnsd, v_bnsd = (part.view(count, longest, *part.shape[1:]).transpose(1, 2) for part in parts)
        mask = None if window is None or longest <= window else _band(longest, window, q.device)
        y_bnsd = F.scaled_dot_product_attention(
            q_bnsd,
            k_bnsd,
            v_bnsd,
            attn_mask=mask,
            dropout_p=dropout_p,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=k.shape[1] != heads,
        )
        outputs.append(y_bnsd.transpose(1, 2).reshape(count * longest, heads, width))
    y_PND = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _collect(y_PND, segments).view(batch, positions, heads, width)


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
    """(B, N, S, D) -> (T, N, D), without a copy where memory already holds heads beside each other."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _spread(x_TND: Tensor, segments: Segments, *, summed: bool) -> Tensor:
    """Tokens (T, N, D) -> places (P, N, D); the gradients of copies are `summed`."""
    if segments.in_order:
        return x_TND
    copies = segments if summed and len(segments.copies) else None
    return _Rearrange.apply(x_TND, segments.token_of, segments.place_of, copies, None)


def _collect(y_PND: Tensor, segments: Segments) -> Tensor:
    """Places (P, N, D) -> tokens (T, N, D)."""
    if segments.in_order:
        return y_PND
    return _Rearrange.apply(y_PND, segments.place_of, segments.token_of, None, segments.unread)


def _band(longest: int, window: int, device: torch.device) -> Tensor:
    index = torch.arange(longest, device=device)
    distance = index[:, None] - index
    return (distance >= 0) & (distance < window)


class _WholeAttention(torch.autograd.Function):
    """softmax(scale Q K^T) V by plain products. q (b, L, N, D), k and v (b, L, M, D) -> (b, L, N, D).

    The queries of the N / M heads that share a key lie below each other: rows of one product, G = L N / M of them.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        batch, longest, heads, width = q.shape
        ctx.shape, ctx.scale = (batch, longest, k.shape[2], heads // k.shape[2], width), scale
        q_cGD, k_cLD, v_cLD = _below(q, ctx.shape), _below(k, ctx.shape), _below(v, ctx.shape)
        seen = _band(longest, window or longest, q.device)
        mask_GL = torch.zeros(longest, longest).masked_fill_(~seen, float("-inf")).repeat(ctx.shape[3], 1)
        weights_cGL = torch.baddbmm(mask_GL.expand(len(k_cLD), -1, -1), q_cGD, k_cLD.transpose(1, 2), alpha=scale)
        weights_cGL = torch.softmax(weights_cGL, -1)
        ctx.save_for_backward(q_cGD, k_cLD, v_cLD, weights_cGL)
        return _beside(torch.bmm(weights_cGL, v_cLD), ctx.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q_cGD, k_cLD, v_cLD, weights_cGL = ctx.saved_tensors
        dy_cGD = _below(dy, ctx.shape)
        dv_cLD = torch.bmm(weights_cGL.transpose(1, 2), dy_cGD)
        d_weights_cGL = torch.bmm(dy_cGD, v_cLD.transpose(1, 2))
        d_scores_cGL = torch._softmax_backward_data(d_weights_cGL, weights_cGL, -1, dy.dtype).mul_(ctx.scale)
        dq = _beside(torch.bmm(d_scores_cGL, k_cLD), ctx.shape)
        dk = _beside(torch.bmm(d_scores_cGL.transpose(1, 2), q_cGD), ctx.shape)
        return dq, dk, _beside(dv_cLD, ctx.shape), None, None


def _below(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(b, L, heads, D) -> (b M, heads / M * L, D)"""
    batch, longest, shared, _, width = shape
    return x.reshape(batch, longest, shared, -1, width).permute(0, 2, 3, 1, 4).reshape(batch * shared, -1, width)


def _beside(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(b M, heads / M * L, D) -> (b, L, heads, D)"""
    batch, longest, shared, _, width = shape
    apart = x.view(batch, shared, -1, longest, width).permute(0, 3, 1, 2, 4)
    return apart.reshape(batch, longest, -1, width)


class _Rearrange(torch.autograd.Function):
    """Rows of x in the order of `index`. `inverse` names the first place of each row; the segments of `copies` the
    further ones; `unread`, the rows of x that the result leaves out: such a query would still pass gradients on to keys
    of its segment."""

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
    """Add the gradients of copies to those of their tokens: in fp32, in the same order every time."""
    sums = gathered.index_select(0, segments.shared).float()
    values = grad.index_select(0, segments.copies).float()
    if grad.device.type == "cpu":
        sums.index_add_(0, segments.copied, values)
    else:  # where index_add_ would be atomic
        sums.index_put_((segments.copied,), values, accumulate=True)
    gathered.index_copy_(0, segments.shared, sums.to(grad.dtype))
