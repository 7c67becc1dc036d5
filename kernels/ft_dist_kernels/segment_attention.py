"""Causal attention inside segments (the samples of packed rows), with neither a mask nor work across their borders.

A mask that keeps the samples of a row apart costs the whole row's square: 25 samples of 40 tokens in a row of 1,000
would take 25 times the arithmetic that they need, and mask every fast path of PyTorch's attention away. Here segments
of like length are laid side by side as a batch, (segments, longest, heads, width); each batch is plain causal
attention, which padding after a segment's end cannot touch.

Shapes: B rows, S positions, T = B S tokens, P places of all batches together, N heads, D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 32
"""Segments up to this long share a batch: attention over so few tokens costs less than another call"""


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each token lies among the batches.

    token_of (P,): the token at each place, some token of the same rows where no segment reaches; place_of (T,): the
    place of each token; padding: the places without a token; shapes: segments and length of each batch, in order.
    `in_order`: the places are the tokens.
    """

    token_of: Tensor
    place_of: Tensor
    padding: Tensor
    shapes: tuple[tuple[int, int], ...]
    in_order: bool

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Segments":
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Segments":
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Segments":
        return replace(
            self, token_of=change(self.token_of), place_of=change(self.place_of), padding=change(self.padding)
        )


def find_segments(position_ids: Tensor) -> Segments:
    """position_ids (B, S) int64 on CPU, 0 where a segment begins; every row begins one."""
    flat = position_ids.reshape(-1)
    starts = torch.nonzero(flat == 0).squeeze(1)
    lengths = torch.diff(starts, append=starts.new_tensor([flat.numel()]))
    order = torch.argsort(lengths, descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    token_of, valid, shapes, first = [], [], [], 0
    while first < len(lengths):
        longest = int(lengths[first])
        shortest = 1 if 1 < longest <= SHORT else longest // 2
        count = int((lengths[first:] > shortest).sum())
        places = torch.arange(longest).expand(count, longest)
        reached = places < lengths[first : first + count, None]
        token_of.append((starts[first : first + count, None] + places * reached).flatten())
        valid.append(reached.flatten())
        shapes.append((count, longest))
        first += count
    tokens, reached = torch.cat(token_of), torch.cat(valid)
    place_of = torch.empty_like(flat)
    place_of[tokens[reached]] = torch.nonzero(reached).squeeze(1)
    in_order = torch.equal(place_of, torch.arange(len(tokens)))
    return Segments(tokens, place_of, torch.nonzero(~reached).squeeze(1), tuple(shapes), in_order)


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
    spread = [_spread(_tokens_first(x), segments).split(sizes) for x in (q, k, v)]
    outputs = []
    for (count, longest), *parts in zip(segments.shapes, *spread, strict=True):
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


def _spread(x_TND: Tensor, segments: Segments) -> Tensor:
    """Tokens (T, N, D) -> places (P, N, D)."""
    return x_TND if segments.in_order else _Rearrange.apply(x_TND, segments.token_of, segments.place_of, None)


def _collect(y_PND: Tensor, segments: Segments) -> Tensor:
    """Places (P, N, D) -> tokens (T, N, D)."""
    if segments.in_order:
        return y_PND
    return _Rearrange.apply(y_PND, segments.place_of, segments.token_of, segments.padding)


def _band(longest: int, window: int, device: torch.device) -> Tensor:
    index = torch.arange(longest, device=device)
    distance = index[:, None] - index
    return (distance >= 0) & (distance < window)


class _Rearrange(torch.autograd.Function):
    """Rows of x in the order of `index`. `inverse` names the one place of each row; `padding`, the rows of x that stand
    for no token: such a query would still pass gradients on to keys of its segment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, padding: Tensor | None) -> Tensor:
        ctx.inverse, ctx.padding = inverse, padding
        return x.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        gathered = grad.index_select(0, ctx.inverse)
        return (gathered if ctx.padding is None else gathered.index_fill_(0, ctx.padding, 0)), None, None, None
