"""The layout of packed rows for attention on a GPU: concatenated segments and their end positions.

Variable-length kernels read the ends from the device, so one call serves all segments of all rows without padding or
shapes that depend on sample lengths: the values that the host passes (the numbers of segments and of keys, the longest
segment) are rounded up coarsely, which adds empty segments.

Queries are the tokens, in order. So are keys, unless segments share a prefix and its tokens (see segments.py): then the
keys of each segment are gathered, and the gradient of a token is the sum over its places.

Shapes: T tokens, K places of keys (K = T unless tokens are shared), N segments.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ft_dist_kernels.attention.segments import Segments, find_segments, segment_lengths


@dataclass(frozen=True, eq=False)
class RaggedSegments:
    """query_ends and key_ends (N + 1,) int32: where segments start and end among queries and keys. In a segment with
    fewer queries than keys the queries are its last tokens: query i of n attends to key j of m if j <= i + m - n.

    longest_queries and longest_keys: at least the longest segment's, for the size of a kernel's grid.

    keys (K,) int64: the token at each place of keys; None if places and tokens are the same. If set, places (K,) int32
    lists the places of each token, token by token, and place_ends (T + 1,) int32 where those of a token start and end.
    Places from key_ends[-1] on belong to no segment or token.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_queries: int
    longest_keys: int
    keys: Tensor | None = None
    places: Tensor | None = None
    place_ends: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "RaggedSegments":
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "RaggedSegments":
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "RaggedSegments":
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        if self.key_ends is self.query_ends:
            changed["key_ends"] = changed["query_ends"]
        return replace(self, **changed)


AnySegments = Segments | RaggedSegments

MAX_GRID = 65535
"""Most segments that kernels accept: their grid's second dimension"""


def segments_for(device_type: str, position_ids: Tensor) -> AnySegments:
    """The segments, on CPU, in the form that attention on the device needs. position_ids (B, S) int64 on CPU: 0 where a
    segment starts, and every row starts one."""
    if device_type == "cpu":
        return find_segments(position_ids)
    return lay_ragged(torch.arange(position_ids.numel()), segment_lengths(position_ids))


def lay_ragged(tokens: Tensor, lengths: Tensor) -> RaggedSegments:
    """tokens (sum of lengths,) int64 on CPU: the token at each position of the concatenated segments. Every token from
    0 to the largest occurs, first occurrences ascend, and segments share only prefixes. lengths: all above 0. Raises
    ValueError for tokens in another order."""
    count = int(tokens.max()) + 1
    at = torch.arange(len(tokens))
    first = at.new_empty(count).scatter_reduce_(0, tokens, at, "amin", include_self=False)
    if not torch.equal(first, first.sort().values):
        raise ValueError("ragged segments need tokens in the order of their first segments")
    queried = torch.zeros(len(tokens), dtype=torch.bool).index_fill_(0, first, True)
    queries = torch.segment_reduce(queried.double(), "sum", lengths=lengths).long()
    asks = queries > 0
    queries, kept = queries[asks], asks.repeat_interleave(lengths)
    size = max(len(queries), min(coarse(len(queries)), MAX_GRID))
    query_ends = _ends(queries, size)
    if bool(queried.all()):
        longest = min(coarse(int(queries.max())), count)
        return RaggedSegments(query_ends, query_ends, longest, longest)
    keys, lengths = tokens[kept], lengths[asks]
    room = fine(len(keys))
    return RaggedSegments(
        query_ends,
        _ends(lengths, size),
        longest_queries=min(coarse(int(queries.max())), count),
        longest_keys=min(coarse(int(lengths.max())), room),
        keys=torch.cat([keys, keys.new_zeros(room - len(keys))]),
        places=torch.cat([torch.argsort(keys, stable=True), keys.new_zeros(room - len(keys))]).int(),
        place_ends=_ends(torch.bincount(keys, minlength=count), count),
    )


def coarse(count: int) -> int:
    """The next power of two: a value that only sizes a kernel's grid may be up to twice as large as necessary."""
    return int(1 << (count - 1).bit_length())


def fine(count: int) -> int:
    """A multiple of 16, at most an eighth larger from 128 on: for values that cost memory and time."""
    unit = max(16, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // unit) * unit


def _ends(lengths: Tensor, segments: int) -> Tensor:
    """(segments + 1,) int32; segments beyond those of `lengths` are empty."""
    ends = torch.zeros(segments + 1, dtype=torch.int32)
    ends[1 : len(lengths) + 1] = torch.cumsum(lengths, 0)
    ends[len(lengths) + 1 :] = ends[len(lengths)].clone()
    return ends
