"""The endless sequence of global batches: a function of (data, seed, max_length, packing), the same on every rank.

An epoch of a source with n samples and weight w takes the next round(w * n) samples of that source's own endless
sequence of permutations, so a weight of 1 is every sample exactly once; a keyed permutation of the epoch's total
interleaves the sources. Windows of that order are packed into rows, shuffled inside their window, and batches take
`global_rows` rows at a time. The last batch of an epoch is smaller; nothing is dropped.

The position is a window and a row in it, so it does not depend on `global_rows`, the world size or the micro-batches,
and going there costs one window's work wherever it is.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ft_dist.data.order import Permutation
from ft_dist.data.packing import DEFAULT_WINDOW, pack_window
from ft_dist.data.store import JoinedStore, SampleStore
from ft_dist.errors import DataError

Row = list[int]
"""Global sample ids that share one row of a batch"""


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The rows of one optimizer step over all ranks, with the counts every rank knows without asking."""

    index: int
    """Batches before this one since the start of the run"""
    epoch: int
    progress: float
    """Epochs done after this batch: 1.25 is a quarter into the second"""
    rows: list[Row]
    row_tokens: list[int]
    samples: int
    labelled_tokens: int
    """Targets over all ranks: what the loss is divided by"""
    real_tokens: int

    @property
    def sample_ids(self) -> list[int]:
        return [sample for row in self.rows for sample in row]


@dataclass(slots=True)
class _Position:
    epoch: int = 0
    window: int = 0
    row: int = 0
    epoch_samples: int = 0
    samples_seen: int = 0
    batches: int = 0


class DataStream:
    """Global batches from stores with weights; `next_batch` never ends.

    `window` is the number of samples packed together; changing it changes the order of rows.
    """

    def __init__(
        self,
        stores_with_weights: Sequence[tuple[SampleStore, float]],
        *,
        seed: int,
        global_rows: int,
        max_length: int,
        packing: bool,
        window: int = DEFAULT_WINDOW,
    ) -> None:
        self.store = JoinedStore([store for store, _ in stores_with_weights])
        self.seed = seed
        self.global_rows = global_rows
        self.max_length = max_length
        self.packing = packing
        self._window = window
        self._sizes = [len(store) for store, _ in stores_with_weights]
        if not self._sizes or min(self._sizes) == 0:
            raise DataError("a source without samples cannot be streamed. Take it out of data.train.")
        # Never zero, or a source with a small weight would silently vanish.
        self._taken = [
            max(1, round(weight * size)) for size, (_, weight) in zip(self._sizes, stores_with_weights, strict=True)
        ]
        self._slots = np.concatenate([[0], np.cumsum(self._taken)]).astype(np.int64)
        self._position = _Position()
        self._rows_of = lru_cache(maxsize=4)(self._window_rows)
        self._permutation = lru_cache(maxsize=64)(Permutation)
        self._row_counts: dict[int, list[int]] = {}

    @cached_property
    def order(self) -> int:
        """Identifies the endless sequence of rows: equal numbers, equal sequences."""
        digest = hashlib.blake2b(digest_size=6)
        packed_to = self.max_length if self.packing else 0
        digest.update(repr((self.seed, self._sizes, self._taken, packed_to, self._window)).encode())
        digest.update(self.store.fingerprint.encode())
        return int.from_bytes(digest.digest(), "little")

    @property
    def epoch_samples(self) -> int:
        """Samples in every epoch."""
        return int(self._slots[-1])

    @property
    def windows(self) -> int:
        """Windows in every epoch."""
        return -(-self.epoch_samples // self._window)

    def next_batch(self) -> GlobalBatch:
        at = self._position
        rows: list[Row] = []
        epoch = at.epoch
        while len(rows) < self.global_rows and at.epoch == epoch:
            in_window = self._rows_of(epoch, at.window)
            taken = in_window[at.row : at.row + self.global_rows - len(rows)]
            rows.extend(taken)
            at.row += len(taken)
            if at.row == len(in_window):
                at.window, at.row = at.window + 1, 0
                if at.window == self.windows:
                    at.epoch, at.window = epoch + 1, 0
        ids = np.array([sample for row in rows for sample in row], np.int64)
        at.epoch_samples += len(ids)
        progress = epoch + at.epoch_samples / self.epoch_samples
        if at.epoch > epoch:
            at.epoch_samples, progress = 0, float(at.epoch)
        at.samples_seen += len(ids)
        at.batches += 1
        lengths = self.store.lengths_of(ids)
        ends = np.cumsum([len(row) for row in rows])
        row_tokens = np.add.reduceat(lengths, np.concatenate([[0], ends[:-1]]))
        return GlobalBatch(
            index=at.batches - 1,
            epoch=epoch,
            progress=progress,
            rows=rows,
            row_tokens=row_tokens.tolist(),
            samples=len(ids),
            labelled_tokens=int(self.store.labelled_of(ids).sum()),
            real_tokens=int(lengths.sum()),
        )

    def state_dict(self) -> dict[str, int]:
        """The position after the last batch, a few integers."""
        at = self._position
        return {
            "epoch": at.epoch,
            "window": at.window,
            "row": at.row,
            "epoch_samples": at.epoch_samples,
            "samples_seen": at.samples_seen,
            "batches": at.batches,
            "order": self.order,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position: a seek. Raises DataError where it belongs to another order of samples."""
        if int(state["order"]) != self.order:
            raise DataError(
                "the checkpoint's place in the data belongs to another order: data.train, its weights, "
                "data.max_length, data.packing or seed have changed. Restore them, or start over with "
                "checkpoint.resume=never."
            )
        names = ("epoch", "window", "row", "epoch_samples", "samples_seen", "batches")
        self._position = _Position(**{name: int(state[name]) for name in names})

    def samples_at(self, epoch: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Global sample ids at positions start .. stop - 1 of an epoch's order, int64."""
        slots = self._permutation(self.epoch_samples, (self.seed, "epoch", epoch)).take(start, stop)
        source_of = np.searchsorted(self._slots, slots, side="right") - 1
        ids = np.empty_like(slots)
        for source, size in enumerate(self._sizes):
            mine = np.flatnonzero(source_of == source)
            place = epoch * self._taken[source] + slots[mine] - self._slots[source]
            local = np.empty_like(place)
            for lap in np.unique(place // size).tolist():
                in_lap = np.flatnonzero(place // size == lap)
                permutation = self._permutation(size, (self.seed, "source", source, lap))
                local[in_lap] = permutation.at(place[in_lap] % size)
            ids[mine] = local + self.store.starts[source]
        return ids

    def steps_in_epoch(self, epoch: int) -> int:
        """Batches of an epoch, exact; packs all of its windows once."""
        return -(-sum(self._rows_in(epoch)) // self.global_rows)

    def total_steps(self, epochs: int) -> int:
        return sum(self.steps_in_epoch(epoch) for epoch in range(epochs))

    def _rows_in(self, epoch: int) -> list[int]:
        """Rows of each window of an epoch."""
        if not self.packing:
            return [self.epoch_samples]
        if epoch not in self._row_counts:
            self._row_counts[epoch] = [len(self._pack(epoch, window)[1]) for window in range(self.windows)]
        return self._row_counts[epoch]

    def _pack(self, epoch: int, window: int) -> tuple[npt.NDArray[np.int64], list[Row]]:
        start = window * self._window
        ids = self.samples_at(epoch, start, min(start + self._window, self.epoch_samples))
        return ids, pack_window(self._lengths_of(ids), self.max_length)

    def _lengths_of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        lengths = self.store.lengths_of(ids)
        if lengths.max() > self.max_length:
            raise DataError(
                f"a sample has {lengths.max()} tokens, but data.max_length={self.max_length}. Prepare the data again."
            )
        return lengths

    def _window_rows(self, epoch: int, window: int) -> list[Row]:
        """The rows of a window in the order they are dealt."""
        if not self.packing:
            start = window * self._window
            ids = self.samples_at(epoch, start, min(start + self._window, self.epoch_samples))
            return [[sample] for sample in ids.tolist()]
        ids, packed = self._pack(epoch, window)
        # packing sorts by length; unshuffled, the first batches of a window would hold the long samples only
        shuffled = self._permutation(len(packed), (self.seed, "rows", epoch, window)).take(0, len(packed))
        return [ids[sorted(packed[row])].tolist() for row in shuffled.tolist()]
