"""Which tokens of a micro-batch have to run: of samples that begin alike the beginning once, and nothing in vain.

What the layers compute at a token depends on the tokens before it in its sample and on nothing else. So the system
prompt that every sample of a micro-batch begins with, or the question that several answers follow, needs one
computation; the gradients of all samples meet in it, and the sums are those of computing it for each. And what stands
after the last token that predicts something changes nothing. Peers compute all of it.

Only tokens without a label are shared, so that each label still has a token of its own. Dropout is drawn for a shared
token once: each sample sees what it would see by itself, but no longer independently of the others.

How many tokens run is rounded up with tokens that would not have to: a little on CPU, to few different counts where a
GPU computes, whose kernels and memory are chosen by shapes.
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
"""Share of the tokens that sharing has to spare: gathering keys of shared tokens has its own price"""


@dataclass(frozen=True, slots=True)
class Needed:
    """kept (T,) int64: the places of the tokens that run, counted as those given are; `segments` lie among them."""

    kept: torch.Tensor
    segments: AnySegments


def needed_tokens(tokens: Places, predicts: Flags, positions: Places, *, round_to: int, ragged: bool = False) -> Needed:
    """All (N,): ids of samples end to end, whether a label belongs to the token, and its position in its sample, 0 for
    every padding token. What is kept is filled up to a multiple of `round_to` with tokens that would not have to run,
    as far as there are any; they make segments of their own. `ragged`: the segments are those of a GPU."""
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
    """Each sample is queried from its first token on that no earlier sample has, and samples and stretches of spare
    tokens follow each other by these, so that queries lie as tokens do."""
    _, first, inverse = np.unique(owner, return_index=True, return_inverse=True)
    owner = place[first][inverse]  # of the samples that share a token the earliest
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
    """Starts and lengths of stretches of tokens that do not run, `missing` together or all: few, so the longest."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], runs, [True]]).astype(np.int8)))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    order = np.argsort(-lengths, kind="stable")
    before = np.cumsum(lengths[order]) - lengths[order]
    order, before = order[before < missing], before[before < missing]
    return starts[order], np.minimum(lengths[order], missing - before)


def _shared_places(place: Places, tokens: Places, predicts: Flags, starts: Places, used: Places) -> Places:
    """For each used token, which lies at `place`, that whose computation serves it: its own, or that in a sample that
    begins alike."""
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
