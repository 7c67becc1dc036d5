"""The layout of packed rows for attention on CPU: segments (the samples) of similar length form a batch.

A mask that separates the samples of a row costs the square of the row's length: 25 samples of 40 tokens in a row of
1,000 would take 25 times the arithmetic that they need, and rule out PyTorch's fast attention paths. Each batch here is
plain causal attention, which padding after a segment's end does not affect.

Segments with a common prefix (a system prompt) can share its tokens: a token's activations depend only on the tokens
before it, so one computation serves all segments, and its gradient is the sum of theirs. A shared token is a key in
every segment that contains it, but a query only once: a segment whose prefix is queried elsewhere starts its queries
after it.

Shapes: T tokens, Q places of queries and K of keys over all batches, C copies.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALL = 128
"""Padding that costs less than the calls of another batch"""


class Shape(NamedTuple):
    """A batch: `rows` segments of up to `longest` tokens; queries start at token `begin` of each."""

    rows: int
    begin: int
    longest: int

    @property
    def queries(self) -> int:
        return self.longest - self.begin

    def seen(self, window: int | None = None) -> Tensor:
        """(queries, longest) bool: the keys that a query attends to, at most `window` of them."""
        distance = torch.arange(self.begin, self.longest)[:, None] - torch.arange(self.longest)
        return distance >= 0 if window is None else (distance >= 0) & (distance < window)


@dataclass(frozen=True, eq=False)
class Segments:
    """The place of every token in the batches.

    queries (Q,) and keys (K,): the token at each place, and any token of the same rows at padding places; query_of and
    key_of (T,): the first place of each token; unread: query places whose output is not used. shared: the tokens with
    several keys; copies (C,): their further places, and copied (C,): the shared token of each. shapes: of the batches,
    in order. `in_order`: places and tokens are the same.
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
    """Cache of what an attention form derives from this once for all layers, by form"""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Segments":
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Segments":
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Segments":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, laid={}, **{name: change(tensor) for name, tensor in tensors.items()})


def find_segments(position_ids: Tensor) -> Segments:
    """position_ids (B, S) int64 on CPU: 0 where a segment starts; every row starts one."""
    return lay_segments(torch.arange(position_ids.numel()), segment_lengths(position_ids))


def segment_lengths(position_ids: Tensor) -> Tensor:
    """(segments,) int64 of position_ids (B, S) int64 on CPU."""
    starts = torch.nonzero(position_ids.reshape(-1) == 0).squeeze(1)
    return torch.diff(starts, append=starts.new_tensor([position_ids.numel()]))


def lay_segments(tokens: Tensor, lengths: Tensor) -> Segments:
    """tokens (sum of lengths,) int64 on CPU: the token at each position of the concatenated segments. Every token from
    0 to the largest occurs, and segments share only prefixes. lengths: all above 0."""
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
    """(R, 3): a segment's start in `tokens`, and the range of its tokens that are queries. A shared prefix is a
    separate run, so that the rest of the segment starts after it, as in the other segments."""
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
    """The longest run with those that join its batch, and the rest. Up to half of a batch's keys may be padding, or a
    few; runs that start at a first token and those that start later are in different batches."""
    _, begin, end = runs.unbind(1)
    longest = int(end.max())
    same_kind = (begin > 0) == bool(begin[end.argmax()] > 0)
    similar = end > longest // 2
    few = torch.cumsum((longest - end) * (same_kind & ~similar), 0) <= SMALL
    joined = same_kind & (similar | few)
    return runs[joined], runs[~joined]


def _first_places(tokens: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) the first used place of each token, and the further ones (in order)."""
    places = torch.nonzero(used).squeeze(1)
    at_places = tokens[places]
    first = places.new_full((int(tokens.max()) + 1,), len(tokens)).scatter_reduce_(0, at_places, places, "amin")
    return first, places[first[at_places] != places]
