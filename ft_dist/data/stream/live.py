"""A source that is tokenised during training: no prepared set, and on disk only the part that is being read.

Records are read in file order, a window at a time, and encoded by worker processes; the samples of a window are packed
into rows and the rows shuffled, as in a prepared set. The content of a row depends only on the source, the tokenizer
and the seed, so every rank reads and encodes the whole source and takes its own rows. In return, ranks need neither a
shared disk nor messages.

The position is the number of a window's first record and a row in that window. A seek skips records without encoding
them; streamed `datasets` load their recorded state, which skips whole files.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from ft_dist.config.schema import DataConfig, SourceConfig
from ft_dist.data.encode.chunk import ChunkEncoder, EncodedChunk, advice_if_unusable
from ft_dist.data.encode.template import tokenizer_identity
from ft_dist.data.encode.workers import available_cores, ordered_map
from ft_dist.data.read.formats import format_of
from ft_dist.data.read.paths import is_saved_dataset, local_path
from ft_dist.data.read.sources import local_files, read_raw_records
from ft_dist.data.read.tables import hub_revision, numbered_rows, open_dataset
from ft_dist.data.read.text_files import RawRecord, Record
from ft_dist.data.store.store import BoolArray, Int64Array, end_to_end, gather_parts
from ft_dist.data.stream.packing import DEFAULT_WINDOW
from ft_dist.data.stream.position import LivePosition, check_position
from ft_dist.data.stream.stream import GlobalBatch, Row, digest, global_batch, rows_of_window
from ft_dist.errors import NEW_RUN, DataError

CHUNK_RECORDS = 256
MOST_WORKERS = 4
"""Per rank; four processes encode about a million tokens per second"""


@dataclass(slots=True)
class _Position:
    epoch: int = 0
    window: int = 0
    row: int = 0
    epoch_samples: int = 0
    samples_seen: int = 0
    batches: int = 0
    record: int = 0
    """Records of the epoch that precede the window"""
    first_id: int = 0
    """Samples of the epoch that precede the window"""


class _Window:
    """Encoded samples of consecutive records: tokens (T,), mask (T,), lengths and labelled (S,)."""

    def __init__(self, chunks: Sequence[EncodedChunk], reader_state: dict[str, Any] | None) -> None:
        self.tokens = np.concatenate([chunk.tokens for chunk in chunks])
        self.mask: BoolArray = np.concatenate([chunk.mask for chunk in chunks])
        self.lengths: Int64Array = np.concatenate([chunk.lengths for chunk in chunks]).astype(np.int64)
        self.labelled: Int64Array = np.concatenate([chunk.labelled for chunk in chunks]).astype(np.int64)
        self.starts: Int64Array = np.cumsum(self.lengths) - self.lengths
        self.records = sum(chunk.counts.records for chunk in chunks)
        self.reader_state = reader_state
        self.rows: list[list[int]] = []


class WindowStore:
    """A `SampleStore` of the windows that batches still refer to."""

    fingerprint = "live"

    def __init__(self) -> None:
        self._windows: list[_Window] = []
        self._first_ids: list[int] = []

    def __len__(self) -> int:
        return sum(len(window.lengths) for window in self._windows)

    def put(self, first_id: int, window: _Window) -> None:
        self._first_ids.append(first_id)
        self._windows.append(window)

    def forget_all_but_the_last(self) -> None:
        del self._windows[:-1], self._first_ids[:-1]

    def forget_all(self) -> None:
        self._windows.clear()
        self._first_ids.clear()

    def lengths_of(self, ids: Int64Array) -> Int64Array:
        return self._look_up(ids, "lengths")

    def labelled_of(self, ids: Int64Array) -> Int64Array:
        return self._look_up(ids, "labelled")

    def gather(self, ids: Int64Array) -> tuple[Int64Array, BoolArray, Int64Array]:
        lengths = self.lengths_of(ids)

        def gather_window(number: int, mine: Int64Array) -> tuple[Int64Array, BoolArray]:
            window = self._windows[number]
            at = end_to_end(window.starts[ids[mine] - self._first_ids[number]], lengths[mine])
            return window.tokens[at].astype(np.int64), window.mask[at]

        return gather_parts(self._window_of(ids), lengths, gather_window)

    def sequences_of(self, ids: Int64Array) -> None:
        """Every sample is one sequence."""

    def expect(self, ids: Int64Array) -> None:
        """Everything is in memory."""

    def close(self) -> None:
        """Nothing to interrupt."""

    def _window_of(self, ids: Int64Array) -> Int64Array:
        return np.searchsorted(self._first_ids, ids, side="right") - 1

    def _look_up(self, ids: Int64Array, name: str) -> Int64Array:
        window_of = self._window_of(ids)
        found = np.zeros(len(ids), np.int64)
        for number in np.unique(window_of).tolist():
            mine = np.flatnonzero(window_of == number)
            found[mine] = getattr(self._windows[number], name)[ids[mine] - self._first_ids[number]]
        return found


class LiveStream:
    """Global batches from one live source; the same rows for every world size. `close` ends the worker processes.

    `window` is the number of records packed together. Raises DataError as `prepare` does, when it reads a bad record.
    """

    def __init__(
        self,
        source: SourceConfig,
        tokenizer: Any,
        *,
        data: DataConfig,
        seed: int,
        global_rows: int,
        packing: bool = True,
        workers: int | None = None,
        window: int = DEFAULT_WINDOW,
    ) -> None:
        self.source = source
        self.store = WindowStore()
        self.global_rows = global_rows
        self._cut = _cut(data, packing)
        self._seed = seed
        self._window_records = window
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._workers = workers or max(1, min(MOST_WORKERS, available_cores() // ranks_here))
        first = next(iter(read_raw_records(source))).parse()
        self._encoder = ChunkEncoder.of(tokenizer, format_of(source, first), data)
        self._rules = live_rules(source, tokenizer, data=data, seed=seed, packing=packing, window=window)
        self._position = _Position()
        self._reader_state: dict[str, Any] | None = None
        self._windows: Iterator[_Window] | None = None
        self._window: _Window | None = None

    def next_batch(self) -> GlobalBatch:
        at = self._position
        self.store.forget_all_but_the_last()
        rows: list[Row] = []
        epoch = at.epoch
        while len(rows) < self.global_rows and at.epoch == epoch:
            window = self._window or self._open()
            taken = window.rows[at.row : at.row + self.global_rows - len(rows)]
            rows += [[at.first_id + sample for sample in row] for row in taken]
            at.row += len(taken)
            if at.row == len(window.rows):
                self._turn(window)
        samples = sum(len(row) for row in rows)
        at.epoch_samples = at.epoch_samples + samples if at.epoch == epoch else 0
        at.samples_seen += samples
        at.batches += 1
        # an epoch's length is unknown until it ends
        return global_batch(self.store, rows, index=at.batches - 1, epoch=epoch, progress=float(at.epoch))

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch: a few integers, and the state of a streamed dataset at its window."""
        return {**asdict(self._position), "rules": self._rules, "reader": self._reader_state}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Seek to a position. There is no mixture, so the list of changes is always empty.

        Raises DataError if it belongs to another source, tokenizer or seed.
        """
        check_live(state, self.source, self._rules)
        check_position(state, LivePosition)
        self.close()
        self._position = _Position(**{name: int(state[name]) for name in asdict(_Position())})
        self._reader_state = state["reader"]
        return []

    def total_steps(self, epochs: int, *, at_most: int | None = None) -> int:
        """`at_most`: the length of a live source is unknown, so the config must set a number of steps."""
        assert at_most is not None, "the config requires optim.max_steps"
        return at_most

    def counts_exactly(self, epochs: int) -> bool:
        return False

    def close(self) -> None:
        """End the workers. The next batch starts them again."""
        if self._windows is not None:
            self._windows.close()  # type: ignore[attr-defined]
        self._windows = self._window = None
        self.store.forget_all()

    def _open(self) -> _Window:
        self._windows = self._read(self._position.record, self._reader_state)
        window = next(self._windows, None)
        if window is None:
            raise DataError(
                f"{self.source.path}: no record is usable with data.max_length={self._cut['max_length']}. "
                f"{advice_if_unusable(self._encoder.too_long)}"
            )
        self._show(window)
        return window

    def _turn(self, window: _Window) -> None:
        """Move to the next window, or to the next epoch if the source has ended."""
        at = self._position
        at.window, at.row = at.window + 1, 0
        at.record += window.records
        at.first_id += len(window.lengths)
        assert self._windows is not None
        following = next(self._windows, None)
        if following is None:
            at.epoch, at.window, at.record, at.first_id = at.epoch + 1, 0, 0, 0
            self._windows = self._window = self._reader_state = None
        else:
            self._reader_state = following.reader_state
            self._show(following)

    def _show(self, window: _Window) -> None:
        at = self._position
        window.rows = rows_of_window(window.lengths, key=(self._seed, "rows", at.epoch, at.window), **self._cut)
        self._window = window
        self.store.put(at.first_id, window)

    def _read(self, record: int, reader_state: dict[str, Any] | None) -> Iterator[_Window]:
        """Windows starting at record `record`; one without a usable sample is merged into the next."""
        states: dict[int, dict[str, Any] | None] = {}
        chunks: list[EncodedChunk] = []
        start, records = record, 0
        encoded = ordered_map(self._encoder, self._jobs(record, reader_state, states), workers=self._workers)
        try:
            for chunk in encoded:
                chunks.append(chunk)
                records += chunk.counts.records
                if records % self._window_records == 0 and any(len(one.lengths) for one in chunks):
                    yield _Window(chunks, states.get(start))
                    states.pop(start, None)
                    start, records, chunks = start + records, 0, []
            if any(len(one.lengths) for one in chunks):
                yield _Window(chunks, states.get(start))
        finally:
            encoded.close()  # type: ignore[attr-defined]

    def _jobs(
        self, record: int, reader_state: dict[str, Any] | None, states: dict[int, dict[str, Any] | None]
    ) -> Iterator[tuple[int, list[Record | RawRecord], bool]]:
        """Chunks of records for the encoder, cut at windows; stores the reader's state at each window in `states`."""
        dataset = open_dataset(self.source) if _is_dataset(self.source) else None
        raws: Iterator[Record | RawRecord]
        if dataset is None:
            raws = islice(read_raw_records(self.source), record, None)
        elif reader_state is not None:
            dataset.load_state_dict(reader_state)
            raws = numbered_rows(dataset, self.source.path, first=record + 1)
        else:
            raws = islice(numbered_rows(dataset, self.source.path), record, None)
        while True:
            if record % self._window_records == 0 and dataset is not None:
                states[record] = dataset.state_dict() if record else None
            size = min(CHUNK_RECORDS, self._window_records - record % self._window_records)
            chunk = list(islice(raws, size))
            if not chunk:
                return
            yield record + 1, chunk, False
            record += len(chunk)


def live_rules(
    source: SourceConfig, tokenizer: Any, *, data: DataConfig, seed: int, packing: bool, window: int = DEFAULT_WINDOW
) -> int:
    """Identifies what decides the rows of a live source."""
    identity = tokenizer_identity(tokenizer)
    return digest(seed, _cut(data, packing), window, data.too_long, sorted(identity.items()), _content(source))


def check_live(state: dict[str, Any], source: SourceConfig, *rules: int) -> None:
    """Raises DataError if the position `state` belongs to none of these rules."""
    if state.get("rules") not in rules:
        raise DataError(
            f"the checkpoint's position does not match {source.path}: the source, the tokenizer, seed or options under "
            f"data have changed. Restore them, or {NEW_RUN}."
        )


def _cut(data: DataConfig, packing: bool) -> dict[str, Any]:
    return {"max_length": data.max_length, "packing": packing, "by_length": data.curriculum == "length"}


def _content(source: SourceConfig) -> list[str]:
    """Identifies a source without reading it: names and sizes of its files, or a hub dataset's revision."""
    files = local_files(source)
    folder = local_path(source.path)
    if files is None and not folder.is_dir():
        return [source.path, source.name or "", source.split, hub_revision(source)]
    if files is None:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [source.split, *chain.from_iterable((file.name, str(file.stat().st_size)) for file in files)]


def _is_dataset(source: SourceConfig) -> bool:
    """Whether the records come through `datasets`, which can restore a recorded state."""
    folder = local_path(source.path)
    return local_files(source) is None and (is_saved_dataset(folder) or not folder.is_dir())
