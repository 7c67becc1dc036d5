"""Which tokens of a micro-batch must run: shared prefixes once, and no token after a sample's last label.

What the layers compute at a token depends only on the tokens before it in its sample. A system prompt that every sample
of a micro-batch starts with, or a question with several answers, therefore needs one computation; the gradients of all
samples accumulate in it, and their sums equal those of computing it per sample. Tokens after the last labelled token
change nothing. Other trainers compute all of them.

Only tokens without a label are shared, so each label keeps its own token. Dropout is drawn once for a shared token:
each sample sees the same distribution as alone, but no longer independently of the others.

The number of tokens that run is rounded up with spare tokens: slightly on CPU, and to few distinct counts on a GPU,
whose kernels and memory depend on shapes.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from ft_dist_kernels.attention.ragged_segments import AnySegments, lay_ragged
from ft_dist_kernels.attention.segments import lay_segments

from ft_dist.data.store.store import end_to_end

Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

WORTHWHILE = 1 / 16
"""Smallest share of tokens that sharing must save: gathering the keys of shared tokens has a cost"""


@dataclass(frozen=True, slots=True)
class Needed:
    """kept (T,) int64: indices of the tokens that run, among those given; `segments` index into `kept`."""

    kept: torch.Tensor
    segments: AnySegments


def needed_tokens(tokens: Places, predicts: Flags, positions: Places, *, round_to: int, ragged: bool = False) -> Needed:
    """Arguments are (N,): token ids of samples end to end, whether the token has a label, and its position in its
    sample, 0 for every padding token. `kept` is filled up to a multiple of `round_to` with spare tokens, if there are
    any; these form separate segments. `ragged`: use the segment layout of a GPU."""
    starts = np.flatnonzero(positions == 0)
    used = np.maximum.reduceat(np.where(predicts, positions + 1, 0), starts)
    alive = used > 0
    if not alive.any():
        used[0], alive[0] = 1, True
    starts, used = starts[alive], used[alive]
    place = end_to_end(starts, used)
    owner = _shared_places(place, tokens, predicts, starts, used)
    if np.count_nonzero(owner != place) < WORTHWHILE * len(place):
        owner = place
    if ragged:
        return _in_order(owner, place, used, of=len(tokens), round_to=round_to)
    runs = np.zeros(len(tokens), np.bool_)
    runs[owner] = True
    spare = np.flatnonzero(~runs)[: -np.count_nonzero(runs) % round_to]
    runs[spare] = True
    where = (np.cumsum(runs) - 1)[np.concatenate([owner, spare])]
    lengths = np.append(used, len(spare)) if len(spare) else used
    segments = lay_segments(torch.from_numpy(where), torch.from_numpy(lengths))
    return Needed(torch.from_numpy(np.flatnonzero(runs)), segments)


def _in_order(owner: Places, place: Places, used: Places, *, of: int, round_to: int) -> Needed:
    """Queries of a sample start at its first token that no earlier sample has. Samples and runs of spare tokens are
    sorted by that token, so queries are stored in token order."""
    _, first, inverse = np.unique(owner, return_index=True, return_inverse=True)
    owner = place[first][inverse]  # the earliest of the samples that share a token
    runs = np.zeros(of, np.bool_)
    runs[owner] = True
    spare_starts, spare_lengths = _longest_gaps(runs, -np.count_nonzero(runs) % round_to)
    spare = end_to_end(spare_starts, spare_lengths)
    runs[spare] = True
    begins = np.cumsum(used) - used
    own = place[begins] + np.add.reduceat((owner != place).astype(np.int64), begins)
    lengths = np.concatenate([used, spare_lengths])
    order = np.argsort(np.concatenate([own, spare_starts]), kind="stable")
    at = end_to_end((np.cumsum(lengths) - lengths)[order], lengths[order])
    where = (np.cumsum(runs) - 1)[np.concatenate([owner, spare])[at]]
    segments = lay_ragged(torch.from_numpy(where), torch.from_numpy(lengths[order]))
    return Needed(torch.from_numpy(np.flatnonzero(runs)), segments)


def _longest_gaps(runs: Flags, missing: int) -> tuple[Places, Places]:
    """Starts and lengths of runs of idle tokens, `missing` tokens in total or all that exist; longest first, to use few
    runs."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], runs, [True]]).astype(np.int8)))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    order = np.argsort(-lengths, kind="stable")
    before = np.cumsum(lengths[order]) - lengths[order]
    order, before = order[before < missing], before[before < missing]
    return starts[order], np.minimum(lengths[order], missing - before)


def _shared_places(place: Places, tokens: Places, predicts: Flags, starts: Places, used: Places) -> Places:
    """For each used token, stored at `place`, the token computed for it: itself, or that of a sample with the same
    prefix."""
    first, owner = np.cumsum(used) - used, place.copy()
    wide = tokens.astype(">u4")
    beginnings = []
    for start, end in zip(starts.tolist(), (starts + used).tolist(), strict=True):
        beginnings.append(wide[start : start + int(predicts[start:end].argmax())].tobytes())
    order = sorted(range(len(starts)), key=beginnings.__getitem__)
    for before, this in pairwise(order):
        common = _common_tokens(beginnings[before], beginnings[this])
        if common:
            owner[first[this] : first[this] + common] = owner[first[before] : first[before] + common]
    return owner


def _common_tokens(one: bytes, other: bytes) -> int:
    size = min(len(one), len(other))
    if not size or one[:4] != other[:4]:
        return 0
    differs = np.frombuffer(one, np.uint32, size // 4) != np.frombuffer(other, np.uint32, size // 4)
    at = int(differs.argmax())
    return at if differs[at] else size // 4
