"""Several sources as one order: how many samples of each make an epoch, and in which order they come.

Positions of an epoch are assigned to sources by the method of Webster and Sainte-Lague: the k-th draw of a source with
n samples per epoch is at (2k + 1) / 2n of the epoch, so at every position each source has contributed its share to
within about one sample. A source's draws follow an endless sequence of keyed permutations, so each pass over it draws
every sample once, for any weight and wherever epochs begin.

A window of positions takes a contiguous range of draws from every source. Inside the window they are shuffled.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ft_dist.data.store.store import Int64Array, JoinedStore, SampleStore
from ft_dist.data.stream.order import BlockPermutation, Permutation, shuffled
from ft_dist.errors import DataError


@dataclass(frozen=True, slots=True)
class MixtureSource:
    """A store and its weight: how often an epoch contains it, on average. `name` appears in messages."""

    name: str
    store: SampleStore
    weight: float = 1.0


def samples_per_epoch(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[int]:
    """Draws from each source in an epoch: weight * size at temperature 1.

    Otherwise the same total with shares proportional to (weight * size) ** (1 / temperature) (Arivazhagan et al., arXiv
    1907.05019), rounded by largest remainders. Never zero: a small source would vanish silently.
    """
    taken = [max(1, round(weight * size)) for size, weight in zip(sizes, weights, strict=True)]
    if temperature == 1.0 or len(taken) == 1:
        return taken
    total = sum(taken)
    parts = [(weight * size) ** (1 / temperature) for size, weight in zip(sizes, weights, strict=True)]
    ideal = [total * part / sum(parts) for part in parts]
    whole = [int(share) for share in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda source: (whole[source] - ideal[source], source))
    for source in by_remainder[: total - sum(whole)]:
        whole[source] += 1
    return [max(1, count) for count in whole]


def draws_before(position: int, taken: Sequence[int]) -> list[int]:
    """The number of draws from each source before a position of the epoch; they sum to `position`.

    The smallest `position` of all keys (2k + 1) / 2n, ties to the earlier source. O(sources * log sources), in exact
    integers: a floor that is at most 3/2 * sources too low, then one draw at a time.
    """
    total, sources = sum(taken), len(taken)
    assert 0 <= position <= total
    # draw k is before t = (position - sources) / total where k < n * t + 1/2
    draws = [max(0, (2 * n * (position - sources) + total) // (2 * total)) for n in taken]
    following = [_Key(2 * k + 1, taken[source], source) for source, k in enumerate(draws)]
    heapq.heapify(following)
    for _ in range(position - sum(draws)):
        source = following[0].source
        draws[source] += 1
        heapq.heapreplace(following, _Key(2 * draws[source] + 1, taken[source], source))
    return draws


@dataclass(frozen=True, slots=True)
class _Key:
    """(2k + 1) / 2n, compared without division."""

    odd: int
    n: int
    source: int

    def __lt__(self, other: "_Key") -> bool:
        mine, theirs = self.odd * other.n, other.odd * self.n
        return mine < theirs or (mine == theirs and self.source < other.source)


class Mixture:
    """Sample ids by epoch and window. Ids are numbered consecutively across the sources."""

    def __init__(
        self, sources: Sequence[MixtureSource], *, seed: int, temperature: float, shuffle_samples: int, window: int
    ) -> None:
        empty = next((source.name for source in sources if not len(source.store)), None)
        if empty is not None or not sources:
            raise DataError(f"{empty or 'data.train'}: no samples to stream. Remove the source from data.train.")
        self.sources = list(sources)
        self.store = JoinedStore([source.store for source in sources])
        self.seed = seed
        self._shuffle_samples = shuffle_samples
        self._sizes = [len(source.store) for source in sources]
        self.taken = samples_per_epoch(self._sizes, [source.weight for source in sources], temperature)
        self.epoch_samples = sum(self.taken)
        # windows of equal size: a short last one would pack badly
        self.windows = max(1, self.epoch_samples // window)
        seen: Counter[str] = Counter()
        self._keys: list[tuple[str, int]] = []
        for source in sources:
            self._keys.append((source.store.fingerprint, seen[source.store.fingerprint]))
            seen[source.store.fingerprint] += 1
        self._permutation = lru_cache(maxsize=64)(self._lap)

    def window_ids(self, epoch: int, window: int, draws: Sequence[int]) -> Int64Array:
        """The samples of one window of an epoch, int64. `draws` counts each source's draws before the epoch."""
        start, stop = (self.epoch_samples * at // self.windows for at in (window, window + 1))
        firsts, lasts = draws_before(start, self.taken), draws_before(stop, self.taken)
        ids = np.concatenate(
            [
                self._drawn(source, before + first, before + last)
                for source, (before, first, last) in enumerate(zip(draws, firsts, lasts, strict=True))
            ]
        )
        return ids[Permutation(len(ids), (self.seed, "window", epoch, window)).take(0, len(ids))]

    def _drawn(self, source: int, first: int, last: int) -> Int64Array:
        """Draws first .. last - 1 of a source's endless sequence, as global ids."""
        size = self._sizes[source]
        draws = np.arange(first, last, dtype=np.int64)
        places = np.empty_like(draws)
        for lap in range(first // size, -(-last // size)):
            mine = slice(max(0, lap * size - first), (lap + 1) * size - first)
            places[mine] = self._permutation(source, lap).at(draws[mine] - lap * size)
        return places + self.store.starts[source]

    def _lap(self, source: int, lap: int) -> Permutation | BlockPermutation:
        key = (self.seed, "source", *self._keys[source], lap)
        return shuffled(self._sizes[source], key, self._shuffle_samples)
