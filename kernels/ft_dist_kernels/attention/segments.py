"""Where the tokens of packed rows lie for attention: segments (the samples) of like length side by side as a batch.

A mask that keeps the samples of a row apart costs the whole row's square: 25 samples of 40 tokens in a row of 1,000
would take 25 times the arithmetic that they need, and mask every fast path of PyTorch's attention away. Each batch here
is plain causal attention, which padding after a segment's end cannot touch.

Segments that begin alike (a system prompt) can share tokens: what a token's layers compute depends on the tokens before
it alone, so that one computation serves all of them, and its gradient is the sum of theirs. A shared token is a key of
every segment that it belongs to and a query once: a segment whose beginning is queried elsewhere asks from there on.

Shapes: T tokens, Q places of queries and K of keys of all batches together, C copies.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALL = 128
"""Places of padding that cost less than another batch's calls"""


class Shape(NamedTuple):
    """A batch: `rows` segments of up to `longest` tokens, each queried from its token number `begin` on."""

    rows: int
    begin: int
    longest: int

    @property
    def queries(self) -> int:
        return self.longest - self.begin

    def seen(self, window: int | None = None) -> Tensor:
        """(queries, longest) bool: which keys a query sees, at most `window` of them."""
        distance = torch.arange(self.begin, self.longest)[:, None] - torch.arange(self.longest)
        return distance >= 0 if window is None else (distance >= 0) & (distance < window)


@dataclass(frozen=True, eq=False)
class Segments:
    """Which token lies where among the batches.

    queries (Q,) and keys (K,): the token at each place, some token of the same rows where no segment reaches;
    query_of and key_of (T,): the first place of each token; unread: the places of queries that no token's output is
    taken from. shared: the tokens with more keys than one; copies (C,): those further places, and copied (C,): of which
    of the shared tokens. shapes: of the batches, in order. `in_order`: places and tokens are the same.
    """

    queries: Tensor
    keys: Tensor
    query_of: Tensor
    key_of: Tensor
    unread: Tensor
    shared: Tensor
    copies: Tensor
    copied: Tensor
    shapes: tuple[Shape, ...]
    in_order: bool
    laid: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What a form of attention derives from this once for all layers, by its own key"""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Segments":
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Segments":
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Segments":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, laid={}, **{name: change(tensor) for name, tensor in tensors.items()})


def find_segments(position_ids: Tensor) -> Segments:
    """position_ids (B, S) int64 on CPU, 0 where a segment begins; every row begins one."""
    return lay_segments(torch.arange(position_ids.numel()), segment_lengths(position_ids))


def segment_lengths(position_ids: Tensor) -> Tensor:
    """(segments,) int64 of position_ids (B, S) int64 on CPU."""
    starts = torch.nonzero(position_ids.reshape(-1) == 0).squeeze(1)
    return torch.diff(starts, append=starts.new_tensor([position_ids.numel()]))


def lay_segments(tokens: Tensor, lengths: Tensor) -> Segments:
    """tokens (sum of lengths,) int64 on CPU: the token at each position of the segments, end to end; every token from 0
    to the largest comes at least once, and what two segments share are their beginnings. lengths: all above 0."""
    runs = _runs(tokens, lengths)
    runs = runs[torch.argsort(runs[:, 2], descending=True, stable=True)]
    shapes, query_at, key_at, query_used, key_used = [], [], [], [], []
    while len(runs):
        batch, runs = _next_batch(runs)
        start, begin, end = batch.unbind(1)
        shape = Shape(len(batch), int(begin.min()), int(end.max()))
        places = torch.arange(shape.longest).expand(shape.rows, -1)
        reached = places < end[:, None]
        positions = start[:, None] + places * reached
        key_at.append(positions.flatten())
        key_used.append(reached.flatten())
        query_at.append(positions[:, shape.begin :].flatten())
        query_used.append((reached & (places >= begin[:, None]))[:, shape.begin :].flatten())
        shapes.append(shape)
    queries, keys = tokens[torch.cat(query_at)], tokens[torch.cat(key_at)]
    query_of, _ = _first_places(queries, torch.cat(query_used))
    key_of, further = _first_places(keys, torch.cat(key_used))
    by_token, order = torch.sort(keys[further], stable=True)
    shared, copied = torch.unique_consecutive(by_token, return_inverse=True)
    read = torch.zeros_like(queries, dtype=torch.bool).index_fill_(0, query_of, True)
    return Segments(
        queries=queries,
        keys=keys,
        query_of=query_of,
        key_of=key_of,
        unread=torch.nonzero(~read).squeeze(1),
        shared=shared,
        copies=further[order],
        copied=copied,
        shapes=tuple(shapes),
        in_order=torch.equal(key_of, torch.arange(len(keys))) and len(queries) == len(keys),
    )


def _runs(tokens: Tensor, lengths: Tensor) -> Tensor:
    """(R, 3): where a segment starts in `tokens`, and from which to before which of its tokens it is queried. What
    others begin with too is a run of its own, so that the rest of the segment begins with it as theirs do."""
    starts = torch.cumsum(lengths, 0) - lengths
    used = torch.bincount(tokens)
    if int(used.max()) == 1:
        return torch.stack([starts, torch.zeros_like(starts), lengths], 1)
    first = torch.empty_like(used).scatter_reduce_(0, tokens, torch.arange(len(tokens)), "amin", include_self=False)
    elsewhere = first[tokens] != torch.arange(len(tokens))
    begin = torch.segment_reduce(elsewhere.float(), "sum", lengths=lengths).long()
    alone = torch.segment_reduce((used[tokens] == 1).float(), "sum", lengths=lengths).long()
    common = torch.maximum(lengths - alone, begin)
    runs = torch.cat([torch.stack([starts, begin, common], 1), torch.stack([starts, common, lengths], 1)])
    return runs[runs[:, 1] < runs[:, 2]]


def _next_batch(runs: Tensor) -> tuple[Tensor, Tensor]:
    """The longest run with those that are laid beside it, and the rest. Up to half of a batch's keys may be padding,
    or a few; runs from a first token on and those from a later one are apart."""
    _, begin, end = runs.unbind(1)
    longest = int(end.max())
    alike = (begin > 0) == bool(begin[end.argmax()] > 0)
    of_like_length = end > longest // 2
    few = torch.cumsum((longest - end) * (alike & ~of_like_length), 0) <= SMALL
    beside = alike & (of_like_length | few)
    return runs[beside], runs[~beside]


def _first_places(tokens: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) the first used place of each token, and the further ones (in order)."""
    places = torch.nonzero(used).squeeze(1)
    at_places = tokens[places]
    first = places.new_full((int(tokens.max()) + 1,), len(tokens)).scatter_reduce_(0, at_places, places, "amin")
    return first, places[first[at_places] != places]
