"""The endless sequence of global batches: a function of (data, seed, max_length, packing), the same on every rank.

`mixture` orders the samples of an epoch. Windows of that order are packed into rows, rows are shuffled inside their
window (or go from short to long samples), and batches take `global_rows` rows at a time. The last batch of an epoch is
smaller; nothing is dropped.

The position is a window and a row in it, so it does not depend on `global_rows`, the world size or the micro-batches,
and a seek costs one window's work wherever it goes. When sources are added, removed or reweighted between two starts of
a run, an epoch of the new mixture begins at that step, and every remaining source continues with its next draw. Inside
the window in progress, whose rows had been shuffled, this holds only for the number of samples: those not yet dealt
come in the source's next pass, and equally many samples come twice. At an epoch's end it is exact.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from ft_dist.data.store.store import SampleStore
from ft_dist.data.stream.mixture import Mixture, MixtureSource
from ft_dist.data.stream.order import Permutation
from ft_dist.data.stream.packing import DEFAULT_WINDOW, pack_window
from ft_dist.data.stream.position import MixturePosition, check_position
from ft_dist.errors import NEW_RUN, CheckpointError, DataError

COUNTED_WINDOWS = 64
"""Steps are counted exactly up to this many windows; beyond them they are estimated"""

HINTED_WINDOWS = 4
"""Windows whose shards a remote store fetches ahead"""

Row = list[int]
"""Global sample ids that share one row of a batch"""


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The rows of one optimizer step over all ranks, with counts that every rank knows without communication."""

    index: int
    """Batches before this one since the start of the run"""
    epoch: int
    progress: float
    """Epochs done after this batch: 1.25 is a quarter into the second"""
    rows: list[Row]
    row_tokens: list[int]
    samples: int
    labelled_tokens: int
    """Targets over all ranks"""
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
    first_epoch: int = 0
    """The epoch that the current mixture started with"""
    first_batch: int = 0
    """The batch that the current mixture started with"""


class DataStream:
    """Global batches from sources; `next_batch` never ends.

    `window` is the minimum number of samples packed together; changing it changes the order of rows.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        *,
        seed: int,
        global_rows: int,
        max_length: int,
        packing: bool,
        temperature: float = 1.0,
        shuffle_samples: int = 2**20,
        curriculum: str = "none",
        window: int = DEFAULT_WINDOW,
    ) -> None:
        self.mixture = Mixture(
            sources, seed=seed, temperature=temperature, shuffle_samples=shuffle_samples, window=window
        )
        self.store = self.mixture.store
        self.seed = seed
        self.global_rows = global_rows
        self.packing = packing
        self._cut: dict[str, Any] = {"max_length": max_length, "packing": packing}
        self.by_length = curriculum == "length"
        self._rules = order_rules(
            seed=seed,
            max_length=max_length,
            packing=packing,
            curriculum=curriculum,
            shuffle_samples=shuffle_samples,
            window=window,
        )
        self._position = _Position()
        self._draws = [0] * len(sources)
        """Samples of each source before the mixture began"""
        self._drawn = [0] * len(sources)
        """Samples of each source up to the position"""
        self._retired: list[dict[str, Any]] = []
        self._forget_windows()

    @property
    def epoch_samples(self) -> int:
        """Samples in every epoch."""
        return self.mixture.epoch_samples

    @property
    def windows(self) -> int:
        """Windows in every epoch."""
        return self.mixture.windows

    @property
    def epochs_done(self) -> int:
        return self._position.epoch

    def next_batch(self) -> GlobalBatch:
        """Raises DataError if a sample is longer than max_length, or its file is missing or damaged."""
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
        ids = np.fromiter(chain.from_iterable(rows), np.int64)
        at.epoch_samples += len(ids)
        progress = epoch + at.epoch_samples / self.epoch_samples
        if at.epoch > epoch:
            at.epoch_samples, progress = 0, float(at.epoch)
        at.samples_seen += len(ids)
        at.batches += 1
        source_of = np.searchsorted(self.store.starts, ids, side="right") - 1
        counts = np.bincount(source_of, minlength=len(self._drawn)).tolist()
        self._drawn = [drawn + count for drawn, count in zip(self._drawn, counts, strict=True)]
        return global_batch(self.store, rows, index=at.batches - 1, epoch=epoch, progress=progress)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch: a few integers, and a few per source."""
        sources = [
            {
                "name": source.name,
                "fingerprint": source.store.fingerprint,
                "taken": taken,
                "draws": draws,
                "drawn": drawn,
            }
            for source, taken, draws, drawn in zip(
                self.mixture.sources, self.mixture.taken, self._draws, self._drawn, strict=True
            )
        ]
        return {**asdict(self._position), "rules": self._rules, "sources": sources, "retired": list(self._retired)}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Seek to a position. Returns the changes to the mixture since then, one line per change.

        Raises DataError if the position belongs to another seed, packing or content of the data, CheckpointError if it
        is none.
        """
        check_order(state, self._rules)
        check_position(state, MixturePosition)
        position = {name: int(state[name]) for name in asdict(_Position())}
        here = [
            (source.store.fingerprint, n) for source, n in zip(self.mixture.sources, self.mixture.taken, strict=True)
        ]
        self._forget_windows()
        if here == [(entry["fingerprint"], entry["taken"]) for entry in state["sources"]]:
            self._position = _Position(**position)
            self._draws = [int(entry["draws"]) for entry in state["sources"]]
            self._drawn = [int(entry["drawn"]) for entry in state["sources"]]
            self._retired = list(state["retired"])
            at = self._position
            if (
                at.epoch < at.first_epoch
                or at.window >= self.windows
                or at.row >= len(self._rows_of(at.epoch, at.window))
            ):
                raise CheckpointError(
                    f"state.json of the checkpoint: data: epoch {at.epoch}, window {at.window}, row {at.row} is not a "
                    f"position in these data of {self.windows} windows. Another program wrote this checkpoint."
                )
            return []
        changes = self._remix(state["sources"], state["retired"])
        begun = {"window": 0, "row": 0, "epoch_samples": 0}
        begun |= {"first_epoch": position["epoch"], "first_batch": position["batches"]}
        self._position = _Position(**{**position, **begun})
        return changes

    def close(self) -> None:
        """The stream has no thread or process to stop."""

    def steps_in_epoch(self, epoch: int) -> int:
        """Batches of an epoch, exact; packs all of its windows once."""
        return -(-sum(self._count_rows(epoch, window) for window in range(self.windows)) // self.global_rows)

    def total_steps(self, epochs: int, *, at_most: int | None = None) -> int:
        """Steps until `epochs` epochs are done, including those before the mixture changed.

        Exact up to COUNTED_WINDOWS windows, or up to `at_most`, where counting stops; beyond, an estimate from the rows
        of the first windows, which is the same at every start.
        """
        at = self._position
        epoch_steps = np.zeros(max(0, epochs - at.first_epoch), np.int64)
        if not self.packing:
            epoch_steps[:] = -(-self.epoch_samples // self.global_rows)
        rows = counted = 0
        for number in range(len(epoch_steps) if self.packing else 0):
            epoch_rows = 0
            for window in range(self.windows):
                if counted == COUNTED_WINDOWS:
                    estimated = (rows + epoch_rows) * self.windows / counted
                    epoch_steps[number:] = -(-round(estimated) // self.global_rows)
                    return _at_most(at.first_batch + int(epoch_steps.sum()), at_most)
                epoch_rows += self._count_rows(at.first_epoch + number, window)
                counted += 1
                epoch_steps[number] = -(-epoch_rows // self.global_rows)
                if at_most is not None and at.first_batch + int(epoch_steps.sum()) >= at_most:
                    return at_most
            rows += epoch_rows
        return _at_most(at.first_batch + int(epoch_steps.sum()), at_most)

    def counts_exactly(self, epochs: int) -> bool:
        """Whether `total_steps` is exact."""
        return not self.packing or (epochs - self._position.first_epoch) * self.windows <= COUNTED_WINDOWS

    def _remix(self, before: list[dict[str, Any]], retired: list[dict[str, Any]]) -> list[str]:
        """Continue every source at its next draw; returns what has changed."""
        changes: list[str] = []
        gone = [*before]
        known: list[dict[str, Any] | None] = []
        for source in self.mixture.sources:
            same = next((entry for entry in gone if entry["fingerprint"] == source.store.fingerprint), None)
            if same is not None:
                gone.remove(same)
            known.append(same)
        added = {source.name for source, entry in zip(self.mixture.sources, known, strict=True) if entry is None}
        rewritten = sorted(added & {entry["name"] for entry in gone})
        if rewritten or not any(known):
            raise DataError(
                f"{', '.join(rewritten) or 'data.train'}: its samples differ from those that the checkpoint "
                "was trained on (the file, the tokenizer or the encoding has changed). Restore them, add the new data "
                f"under a new name next to the old, or {NEW_RUN}."
            )
        left = [*retired]
        for number, (source, entry) in enumerate(zip(self.mixture.sources, known, strict=True)):
            taken = self.mixture.taken[number]
            if entry is None:
                entry = next((old for old in left if old["fingerprint"] == source.store.fingerprint), None)
                if entry is not None:
                    left.remove(entry)
                changes.append(f"{source.name} added: {taken} samples per epoch")
            elif entry["taken"] != taken:
                changes.append(f"{source.name}: {taken} samples per epoch instead of {entry['taken']}")
            self._draws[number] = self._drawn[number] = int(entry["drawn"]) if entry else 0
        changes += [f"{entry['name']} removed after {entry['drawn']} samples" for entry in gone]
        self._retired = left + [{key: entry[key] for key in ("name", "fingerprint", "drawn")} for entry in gone]
        return changes or ["the order of the sources has changed"]

    def _forget_windows(self) -> None:
        self._ids_of = lru_cache(maxsize=2 * HINTED_WINDOWS)(self._window_ids)
        self._rows_of = lru_cache(maxsize=4)(self._window_rows)
        self._row_counts: dict[tuple[int, int], int] = {}

    def _count_rows(self, epoch: int, window: int) -> int:
        if (epoch, window) not in self._row_counts:
            self._row_counts[epoch, window] = len(
                pack_rows(self.store.lengths_of(self._window_ids(epoch, window)), **self._cut)
            )
        return self._row_counts[epoch, window]

    def _window_ids(self, epoch: int, window: int) -> npt.NDArray[np.int64]:
        passed = epoch - self._position.first_epoch
        draws = [before + passed * taken for before, taken in zip(self._draws, self.mixture.taken, strict=True)]
        return self.mixture.window_ids(epoch, window, draws)

    def _window_rows(self, epoch: int, window: int) -> list[Row]:
        """The rows of a window in the order in which they are dealt."""
        ids = self._ids_of(epoch, window)
        self.store.expect(np.concatenate([ids, *self._following(epoch, window)]))
        key = (self.seed, "rows", epoch, window)
        rows = rows_of_window(self.store.lengths_of(ids), key=key, by_length=self.by_length, **self._cut)
        listed = ids.tolist()
        return [[listed[at] for at in row] for row in rows]

    def _following(self, epoch: int, window: int) -> list[npt.NDArray[np.int64]]:
        """The samples of the next windows; the last window is followed by the first one of the next epoch."""
        return [
            self._ids_of(epoch + ahead // self.windows, ahead % self.windows)
            for ahead in range(window + 1, window + 1 + min(HINTED_WINDOWS, self.windows))
        ]


def order_rules(
    *,
    seed: int,
    max_length: int,
    packing: bool,
    curriculum: str,
    shuffle_samples: int,
    window: int = DEFAULT_WINDOW,
) -> int:
    """Identifies what decides the order of given samples."""
    return digest(seed, max_length if packing else 0, curriculum == "length", shuffle_samples, window)


def check_order(state: dict[str, Any], *rules: int) -> None:
    """Raises DataError if the position `state` belongs to none of these rules."""
    if state.get("rules") not in rules:
        raise DataError(
            "the checkpoint's position belongs to another order of the data: seed, data.max_length, data.packing, "
            f"data.curriculum or data.shuffle_samples has changed. Restore them, or {NEW_RUN}."
        )


def global_batch(store: SampleStore, rows: list[Row], *, index: int, epoch: int, progress: float) -> GlobalBatch:
    """Rows with their counts."""
    ids = np.fromiter(chain.from_iterable(rows), np.int64)
    lengths = store.lengths_of(ids)
    ends = np.cumsum([len(row) for row in rows])
    row_tokens = np.add.reduceat(lengths, np.concatenate([[0], ends[:-1]]))
    return GlobalBatch(
        index=index,
        epoch=epoch,
        progress=progress,
        rows=rows,
        row_tokens=row_tokens.tolist(),
        samples=len(ids),
        labelled_tokens=int(store.labelled_of(ids).sum()),
        real_tokens=int(lengths.sum()),
    )


def rows_of_window(
    lengths: npt.NDArray[np.int64], *, max_length: int, packing: bool, by_length: bool, key: tuple[int | str, ...]
) -> list[list[int]]:
    """Rows of indices into `lengths` in dealing order: shuffled by the key, or from short to long samples.

    Raises DataError if a sample is longer than `max_length`.
    """
    packed = pack_rows(lengths, max_length=max_length, packing=packing)
    # packing begins with the longest samples; unshuffled, the first batches of a window would hold them all
    order = Permutation(len(packed), key).take(0, len(packed))
    if by_length:
        means = np.array([lengths[row].mean() for row in packed])
        order = order[np.argsort(means[order], kind="stable")]
    return [packed[row] for row in order.tolist()]


def pack_rows(lengths: npt.NDArray[np.int64], *, max_length: int, packing: bool) -> list[list[int]]:
    """Rows of indices into `lengths`, not in training order. Raises DataError as `rows_of_window` does."""
    if lengths.max() > max_length:
        raise DataError(
            f"a sample has {lengths.max()} tokens, but data.max_length={max_length}. Prepare the data again."
        )
    return pack_window(lengths, max_length) if packing else [[at] for at in range(len(lengths))]


def _at_most(steps: int, limit: int | None) -> int:
    return steps if limit is None else min(steps, limit)


def digest(*parts: object) -> int:
    """48 bits of a hash of the arguments' repr."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "little")
