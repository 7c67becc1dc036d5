"""Fill rows of a fixed capacity with whole samples, a window of the global order at a time.

A row starts with the largest remaining sample, continues with samples in window order (so the remaining samples keep
the distribution of the data, and the end of the window is not all large or all small), and is closed by the one, two or
three samples that fill it best: the minimum-bin-slack idea of Gupta and Ho (1999) with a bounded search. On narrow
distributions of lengths, where best-fit decreasing leaves gaps that no sample fits, rows come out full. Best-fit
decreasing (at most 11/9 of the optimum plus one: Johnson, 1974) is also tried wherever it could do better.

A window bounds the work and makes packing a function of the window's samples only.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

DEFAULT_WINDOW = 8192
"""Minimum number of samples packed together. Each window ends with a half-full row, so larger windows pack better; this
size packs in tens of milliseconds, which a seek into the middle of an epoch costs once."""

_CLOSE_BELOW = 3.5  # times the mean length: what one to three samples can fill
_WASTED_SHARE = 64  # a row may be closed with capacity / this tokens empty; otherwise it is filled greedily
_THIRDS = 16  # candidates for the third sample


def pack_window(lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each row at most `capacity` tokens, every index once. Deterministic.

    Never more rows than best-fit decreasing gives. Lengths must be in [1, capacity].
    """
    sizes = np.asarray(lengths, np.int64)
    if not sizes.size:
        return []
    assert sizes.min() > 0 and sizes.max() <= capacity, "prepare keeps samples within max_length"  # noqa: PT018
    rows = _Pool(sizes, capacity).fill_rows()
    if len(rows) * capacity - int(sizes.sum()) < capacity:
        return rows  # no packing has fewer
    return min(rows, _best_fit_decreasing(sizes, capacity), key=len)


class _Pool:
    """The samples of a window that are not in a row yet, as counts of their lengths.

    The remaining lengths are also the set bits of `_present`, and of `_mirrored` (bit capacity - length): whether
    two of them add up to s, and which, is a shift and an AND.
    """

    def __init__(self, sizes: npt.NDArray[np.int64], capacity: int) -> None:
        self.capacity = capacity
        self._in_order: list[int] = sizes.tolist()
        self._next = 0
        self._by_size: list[int] = np.argsort(sizes, kind="stable").tolist()
        counts = np.bincount(sizes, minlength=capacity + 1)
        self._starts: list[int] = (np.cumsum(counts) - counts).tolist()
        self._counts: list[int] = counts.tolist()
        self._tokens, self._left = int(sizes.sum()), len(sizes)
        self._present = self._mirrored = 0
        for length in np.flatnonzero(counts).tolist():
            self._toggle(length)

    def fill_rows(self) -> list[list[int]]:
        rows = []
        while self._left:
            space, row = self.capacity, list[int]()
            length = self._largest_within(space)
            while length:
                row.append(self._take(length))
                space -= length
                if self._left and space <= _CLOSE_BELOW * self._tokens / self._left:
                    closing = self._closing(space)
                    row += [self._take(length) for length in closing]
                    space -= sum(closing)
                    length = self._largest_within(space)
                else:
                    length = self._next_within(space)
            rows.append(row)
        return rows

    def _take(self, length: int) -> int:
        self._counts[length] -= 1
        if not self._counts[length]:
            self._toggle(length)
        self._tokens -= length
        self._left -= 1
        return self._by_size[self._starts[length] + self._counts[length]]

    def _toggle(self, length: int) -> None:
        self._present ^= 1 << length
        self._mirrored ^= 1 << (self.capacity - length)

    def _largest_within(self, space: int) -> int:
        """0 if nothing fits."""
        return max(0, (self._present & ((2 << space) - 1)).bit_length() - 1)

    def _next_within(self, space: int) -> int:
        """The next length in window order that fits, or after a few misses the largest that does."""
        for _ in range(4):
            length = self._in_order[self._next]
            self._next = (self._next + 1) % len(self._in_order)
            if length <= space and self._counts[length]:
                return length
        return self._largest_within(space)

    def _closing(self, space: int) -> list[int]:
        """One to three lengths that fill `space` up to a few tokens, as few as possible; empty if there are none."""
        for wasted in range(min(space, self.capacity // _WASTED_SHARE + 1)):
            target = space - wasted
            if self._counts[target]:
                return [target]
            if half := self._half_of_pair(target):
                return [half, target - half]
            if wasted < 4 and (three := self._three(target)):
                return three
        return []

    def _half_of_pair(self, target: int) -> int:
        """The larger of the two most similar remaining lengths that add up to `target`; 0 if there are none."""
        halves = self._present & (self._mirrored >> (self.capacity - target))
        half = (target + 1) // 2
        if target % 2 == 0 and self._counts[half] == 1:
            halves &= ~(1 << half)
        halves >>= half
        return half + (halves & -halves).bit_length() - 1 if halves else 0

    def _three(self, target: int) -> list[int]:
        for third in self._in_order[self._next : self._next + _THIRDS]:
            if third >= target - 1 or not self._counts[third]:
                continue
            self._counts[third] -= 1
            last = not self._counts[third]
            if last:
                self._toggle(third)
            half = self._half_of_pair(target - third)
            self._counts[third] += 1
            if last:
                self._toggle(third)
            if half:
                return [third, half, target - third - half]
        return []


def _best_fit_decreasing(sizes: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """O(n log n) for the sort, then a scan of a `capacity`-bit set for each sample."""
    by_size = np.argsort(-sizes, kind="stable")
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # space left -> rows, the newest last
    spaces = 0  # bit s is set if a row has s tokens left: "smallest s >= size" is a shift and a lowest bit
    for index, size in zip(by_size.tolist(), sizes[by_size].tolist(), strict=True):
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
            rows[row].append(index)
        else:
            space, row = capacity, len(rows)
            rows.append([index])
        left = space - size
        if left:
            if not with_space[left]:
                spaces |= 1 << left
            with_space[left].append(row)
    return rows
