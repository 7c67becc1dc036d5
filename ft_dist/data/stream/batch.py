"""Deal a global batch to ranks and turn rows of samples into tensors, ahead of the training thread.

Shapes: R rows of a micro-batch, L tokens of its longest row, rounded up: on CPU to a multiple of 8, on a GPU to a
sixteenth of the longest row that the run may see. Kernels, allocator and matrix products then see few shapes although
sample lengths vary from step to step, and all are multiples of 16, which Triton and tensor cores prefer.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from ft_dist_kernels.attention.ragged_segments import AnySegments

from ft_dist.data.store.store import SampleStore, end_to_end
from ft_dist.data.stream.prefixes import needed_tokens
from ft_dist.data.stream.stream import GlobalBatch, Row
from ft_dist.errors import UserError

IGNORED = -100
"""Label of a token that predicts nothing (the default of torch's cross entropy)"""

ROUND_TO = 8

GPU_SHAPES = 16
"""How many row lengths a micro-batch may have on a GPU, and how many token counts for the same number of rows"""

INPUTS = ("input_ids", "labels", "position_ids", "kept", "segments", "labelled")

GIVE_UP_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Groups:
    """Which sequences of a micro-batch belong together: a preference pair is a sample of two sequences.

    sample_of_sequence: (Q,) int64, ascending. sequence_of_label: (N,) int64, the sequence of each labelled token.
    """

    sample_of_sequence: torch.Tensor
    sequence_of_label: torch.Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Groups":
        return Groups(
            self.sample_of_sequence.to(device, non_blocking=non_blocking),
            self.sequence_of_label.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Groups":
        return Groups(self.sample_of_sequence.pin_memory(), self.sequence_of_label.pin_memory())


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Tensors of one forward.

    input_ids, labels, position_ids: (R, L) int64. `labels[r, t]` is the token that position t predicts (shifted
    already), and IGNORED where the next token is not labelled, belongs to another sample, or is padding. Positions
    restart at 0 with each sample; each pad token is a separate segment at position 0.

    kept: (T,) int64, flat indices of the tokens that must run where attention runs sample by sample (see prefixes.py);
    T is rounded up as L is, over all R rows. `segments` index into these.

    labelled: (N,) int64, ascending, indices into `kept` of the tokens with a label. The loss selects its rows with it:
    searching for labels on a GPU would stall the queue.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    kept: torch.Tensor
    segments: AnySegments
    labelled: torch.Tensor
    real_tokens: int
    labelled_tokens: int
    padded_tokens: int
    """Pad tokens: real_tokens + padded_tokens = R * L"""
    samples: int = 0
    groups: "Groups | None" = None
    """Set if samples hold several sequences; None if each holds one"""

    def inputs(self) -> dict[str, Any]:
        """What the objective's forward takes."""
        named = {name: getattr(self, name) for name in INPUTS}
        return named if self.groups is None else {**named, "groups": self.groups}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "MicroBatch":
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in self.inputs().items()}
        return replace(self, **moved)

    def pin_memory(self) -> "MicroBatch":
        return replace(self, **{name: value.pin_memory() for name, value in self.inputs().items()})


def deal(batch: GlobalBatch, *, rank: int, world: int, micro_rows: int) -> list[list[Row]]:
    """The micro-batches of one rank, the same number on every rank; an empty one becomes a dummy.

    Rows are dealt longest first, back and forth over the ranks, which balances tokens over ranks and groups rows of
    similar length into a micro-batch. Every row goes to exactly one rank, for any world size.
    """
    tokens = np.asarray(batch.row_tokens, np.int64)
    longest_first = np.argsort(-tokens, kind="stable").tolist()
    mine = []
    for lap_start in range(0, len(longest_first), world):
        seat = rank if (lap_start // world) % 2 == 0 else world - 1 - rank
        if lap_start + seat < len(longest_first):
            mine.append(batch.rows[longest_first[lap_start + seat]])
    rows_per_rank = -(-len(batch.rows) // world)
    micro_batches = -(-rows_per_rank // micro_rows)
    return [mine[number * micro_rows : (number + 1) * micro_rows] for number in range(micro_batches)]


def collate(rows: Sequence[Row], store: SampleStore, *, pad_id: int = 0, gpu_length: int | None = None) -> MicroBatch:
    """Turn rows of global sample ids into tensors. Without rows, returns a dummy without labels: one pad token on CPU,
    the shortest row length on a GPU. `gpu_length`: the longest row of the run, if it trains on a GPU."""
    round_to = ROUND_TO if gpu_length is None else -(-gpu_length // (GPU_SHAPES * 16)) * 16
    if not rows:
        zero = np.zeros((1, 1 if gpu_length is None else round_to), np.int64)
        return _micro_batch(zero + pad_id, zero + IGNORED, zero, 0, round_to, gpu_length is not None)
    ids = np.fromiter(chain.from_iterable(rows), np.int64)
    tokens, mask, lengths = store.gather(ids)
    grouped = store.sequences_of(ids)
    sequence_lengths = lengths if grouped is None else grouped[0]
    positions = end_to_end(np.zeros_like(sequence_lengths), sequence_lengths)
    targets = np.flatnonzero(mask & (positions > 0))  # the first token of a sequence has no token before it
    labels = np.full(len(tokens), IGNORED, np.int64)
    labels[targets - 1] = tokens[targets]

    samples = np.cumsum([len(row) for row in rows])
    ends = np.cumsum(lengths)[samples - 1].tolist()
    starts = [0, *ends[:-1]]
    width = -(-max(end - start for start, end in zip(starts, ends, strict=True)) // round_to) * round_to
    input_RL = np.full((len(rows), width), pad_id, np.int64)
    label_RL = np.full((len(rows), width), IGNORED, np.int64)
    position_RL = np.zeros((len(rows), width), np.int64)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        input_RL[row, : end - start] = tokens[start:end]
        label_RL[row, : end - start] = labels[start:end]
        position_RL[row, : end - start] = positions[start:end]
    if gpu_length is not None:
        round_to *= len(rows)
    batch = _micro_batch(input_RL, label_RL, position_RL, len(tokens), round_to, gpu_length is not None)
    groups = None
    if grouped is not None:
        sequence_of_label = np.repeat(np.arange(len(sequence_lengths)), sequence_lengths)[labels != IGNORED]
        sample_of_sequence = np.repeat(np.arange(len(ids)), grouped[1])
        groups = Groups(torch.from_numpy(sample_of_sequence), torch.from_numpy(sequence_of_label))
    return replace(batch, samples=len(ids), groups=groups)


def _micro_batch(
    input_RL: np.ndarray, label_RL: np.ndarray, position_RL: np.ndarray, real_tokens: int, round_to: int, gpu: bool
) -> MicroBatch:
    predicts = label_RL != IGNORED
    flat = input_RL.ravel(), predicts.ravel(), position_RL.ravel()
    needed = needed_tokens(*flat, round_to=round_to, ragged=gpu)
    labelled = np.searchsorted(needed.kept.numpy(), np.flatnonzero(predicts))
    return MicroBatch(
        input_ids=torch.from_numpy(input_RL),
        labels=torch.from_numpy(label_RL),
        position_ids=torch.from_numpy(position_RL),
        kept=needed.kept,
        segments=needed.segments,
        labelled=torch.from_numpy(labelled),
        real_tokens=real_tokens,
        labelled_tokens=len(labelled),
        padded_tokens=input_RL.size - real_tokens,
    )


class Prefetched(NamedTuple):
    """One optimizer step's data on one rank."""

    batch: GlobalBatch
    micro_batches: list[MicroBatch]
    state_after: dict[str, Any]
    """The stream's position after this batch, which a checkpoint stores; the thread may be further ahead"""
    given_up: bool = False
    """Holds dummies: the batch did not arrive before the run was asked to stop, or cannot be read"""
    error: UserError | None = None
    """Why it cannot be read, on this rank. Others may read it and wait for this rank in the step, so it takes part"""


class BatchStream(Protocol):
    """The source of global batches: a `DataStream` or a `LiveStream`."""

    store: Any
    """The `SampleStore` that the last batch's sample ids refer to"""

    def next_batch(self) -> GlobalBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> list[str]: ...

    def total_steps(self, epochs: int, *, at_most: int | None = None) -> int: ...

    def counts_exactly(self, epochs: int) -> bool: ...

    def close(self) -> None: ...


class Prefetcher:
    """Iterates over `Prefetched`, at most `depth` batches ahead; `close` (or the end of `with`) stops the thread.

    It owns the stream while open. An error in a rank's own part of a batch is delivered as `Prefetched.error`; any
    other error on the thread is raised when the consumer asks for the next batch. While the consumer waits, `give_up`
    is polled: if true, it gets dummies, because other ranks may be in a collective that ends only when this rank takes
    a step. On a GPU (`gpu_length` is set) batches are pinned.
    """

    def __init__(
        self,
        stream: BatchStream,
        *,
        rank: int,
        world: int,
        micro_rows: int,
        pad_id: int = 0,
        gpu_length: int | None = None,
        depth: int = 2,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stream = stream
        self._deal = {"rank": rank, "world": world, "micro_rows": micro_rows}
        self._collate = partial(collate, pad_id=pad_id, gpu_length=gpu_length)
        self._pin_memory = gpu_length is not None
        # a thread starts on the first GPU: without this every rank would pin there and hold 500 MB of that GPU
        self._gpu = torch.cuda.current_device() if self._pin_memory else None
        self._ready: queue.Queue[Prefetched | BaseException] = queue.Queue(maxsize=depth)
        self._give_up = give_up
        self._given_up = False
        self._failed: UserError | None = None
        """The error of the last batch: there is none after it"""
        self._collating: tuple[GlobalBatch, dict[str, int]] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="data-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Prefetched]:
        return self

    def __next__(self) -> Prefetched:
        if self._closing.is_set():
            raise StopIteration
        item = self._failed or self._next_ready()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._failed = item.error
        return item

    def _next_ready(self) -> Prefetched | BaseException:
        while True:
            try:
                return self._ready.get(timeout=GIVE_UP_POLL_S)
            except queue.Empty:
                awaited = self._collating
                # a full queue means that `awaited` is already the batch after the one asked for
                if awaited is not None and self._ready.empty() and self._give_up():
                    self._given_up = True
                    batch, state_after = awaited
                    return self._dummies(batch, state_after)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop and join the thread; batches collated ahead are discarded. May be called twice.

        After giving up, the thread is not joined: it may be blocked in a read that never ends.
        """
        self._closing.set()
        self._stream.store.close()  # the thread may be waiting for a remote shard
        while self._thread.is_alive() and not self._given_up:
            try:
                self._ready.get_nowait()  # the thread may be waiting for space
            except queue.Empty:
                self._thread.join(timeout=0.01)
        self._stream.close()

    def _run(self) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            while not self._closing.is_set():
                item = self._collate_next()
                self._put(item)
                if item.error:
                    return
        except BaseException as error:
            self._put(error)

    def _collate_next(self) -> Prefetched:
        batch = self._stream.next_batch()
        state_after = self._stream.state_dict()
        self._collating = batch, state_after
        try:
            micro_batches = [self._collate(rows, self._stream.store) for rows in deal(batch, **self._deal)]
        except UserError as error:
            return self._dummies(batch, state_after, error)
        if self._pin_memory:
            micro_batches = [micro_batch.pin_memory() for micro_batch in micro_batches]
        return Prefetched(batch, micro_batches, state_after)

    def _dummies(self, batch: GlobalBatch, state_after: dict[str, Any], error: UserError | None = None) -> Prefetched:
        dummies = [self._collate((), self._stream.store) for _ in deal(batch, **self._deal)]
        return Prefetched(batch, dummies, state_after, given_up=True, error=error)

    def _put(self, item: Prefetched | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
