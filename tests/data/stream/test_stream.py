"""The sequence of global batches follows the sources' weights, seeks in O(1), and is the same for any world size."""

import json
import time
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dist.data.stream.batch import Prefetcher, deal
from ft_dist.data.stream.mixture import MixtureSource
from ft_dist.data.stream.stream import COUNTED_WINDOWS, DataStream
from ft_dist.errors import DataError
from tests.data.stores import Lengths, Virtual


def make(sizes_and_weights, *, seed=0, global_rows=4, packing=True, window=64, max_length=32, **options) -> DataStream:
    sources = [
        MixtureSource(f"s{number}", Lengths(size, seed=number), weight)
        for number, (size, weight) in enumerate(sizes_and_weights)
    ]
    cut = {"global_rows": global_rows, "max_length": max_length, "packing": packing, "window": window}
    return DataStream(sources, seed=seed, **cut, **options)


def epoch_of(stream: DataStream, epoch: int) -> list:
    batches = []
    while stream.state_dict()["epoch"] == epoch:
        batches.append(stream.next_batch())
    return batches


# Deadlines would fail on a busy machine, not because of a defect.
some = settings(max_examples=30, deadline=None)

streams = st.fixed_dictionaries(
    {
        "sizes_and_weights": st.lists(st.tuples(st.integers(1, 100), st.just(1.0)), min_size=1, max_size=3),
        "seed": st.integers(0, 2**63 - 1),
        "global_rows": st.integers(1, 20),
        "packing": st.booleans(),
        "window": st.sampled_from([5, 20, 1000]),
    }
)


@given(streams)
@some
def test_every_sample_exactly_once_per_epoch(options):
    stream = make(**options)
    total = sum(size for size, _ in options["sizes_and_weights"])
    for epoch in range(3):
        batches = epoch_of(stream, epoch)
        seen = [sample for batch in batches for sample in batch.sample_ids]
        assert sorted(seen) == list(range(total))
        assert {batch.epoch for batch in batches} == {epoch}
        assert all(len(batch.rows) == options["global_rows"] for batch in batches[:-1])
        assert batches[-1].progress == epoch + 1
        assert len(batches) == stream.steps_in_epoch(epoch)
    if stream.counts_exactly(3):
        assert stream.total_steps(3) == stream.state_dict()["batches"]
    assert stream.state_dict()["samples_seen"] == 3 * total


@given(streams, st.lists(st.integers(1, 64), min_size=1, max_size=8), st.integers(1, 4))
@some
def test_union_over_ranks_is_the_batch_for_any_world(options, worlds, micro_rows):
    """A run that changes its world size at every step gets the same sequence as one that never does."""
    still, moving = make(**options), make(**options)
    for step in range(12):
        expected = still.next_batch()
        resumed = make(**options)
        resumed.load_state_dict(moving.state_dict())
        moving = resumed
        batch = moving.next_batch()
        world = worlds[step % len(worlds)]
        dealt = [deal(batch, rank=rank, world=world, micro_rows=micro_rows) for rank in range(world)]
        rows = [row for micro_batches in dealt for micro_batch in micro_batches for row in micro_batch]
        assert sorted(rows) == sorted(expected.rows)
        assert batch == expected


@given(streams, st.integers(0, 40))
@some
def test_seek_equals_walking_there(options, steps):
    walked = make(**options)
    for _ in range(steps):
        walked.next_batch()
    written = json.dumps(walked.state_dict())
    assert len(written) < 1000
    state = json.loads(written)
    sought = make(**options)
    sought.load_state_dict(state)
    for _ in range(5):
        assert sought.next_batch() == walked.next_batch()
    assert sought.state_dict() == walked.state_dict()


@given(streams, st.integers(1, 20))
@some
def test_position_does_not_depend_on_global_rows(options, other_rows):
    """Rows form one sequence; batches only cut it."""
    first, second = make(**options), make(**{**options, "global_rows": other_rows})
    rows = [[row for batch in epoch_of(stream, 0) for row in batch.rows] for stream in (first, second)]
    assert rows[0] == rows[1]


@given(
    st.lists(st.tuples(st.integers(1, 100), st.floats(0.05, 4.0)), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 1000),
)
@some
def test_weights_hold_exactly(sizes_and_weights, packing, seed):
    stream = make(sizes_and_weights, packing=packing, seed=seed)
    starts = np.cumsum([0] + [size for size, _ in sizes_and_weights])
    seen = [np.zeros(size, int) for size, _ in sizes_and_weights]
    for epoch in range(4):
        ids = np.array([sample for batch in epoch_of(stream, epoch) for sample in batch.sample_ids])
        for source, (size, weight) in enumerate(sizes_and_weights):
            mine = ids[(ids >= starts[source]) & (ids < starts[source + 1])] - starts[source]
            assert len(mine) == max(1, round(weight * size))
            np.add.at(seen[source], mine, 1)
            # no sample comes a third time before every sample has come twice
            assert seen[source].max() - seen[source].min() <= 1


def test_a_batchs_counts_equal_its_samples_counts():
    stream = make([(100, 1.0)])
    for _ in range(40):
        batch = stream.next_batch()
        lengths = stream.store.lengths_of(np.array(batch.sample_ids))
        assert batch.samples == len(lengths)
        assert batch.real_tokens == lengths.sum() == sum(batch.row_tokens)
        assert batch.labelled_tokens == stream.store.labelled_of(np.array(batch.sample_ids)).sum()
        assert [int(stream.store.lengths_of(np.array(row)).sum()) for row in batch.rows] == batch.row_tokens


def test_epochs_and_seeds_differ():
    ids = lambda stream, epoch: [s for batch in epoch_of(stream, epoch) for s in batch.sample_ids]  # noqa: E731
    stream = make([(200, 1.0)])
    first, second = ids(stream, 0), ids(stream, 1)
    assert first != second
    assert ids(make([(200, 1.0)], seed=1), 0) != first
    assert ids(make([(200, 1.0)]), 0) == first


def test_rows_of_a_window_are_not_sorted_by_length():
    stream = make([(2000, 1.0)], packing=True, window=2000, global_rows=1, max_length=64)
    sizes = np.array([len(batch.rows[0]) for batch in epoch_of(stream, 0)], float)
    assert abs(np.corrcoef(sizes, np.arange(len(sizes)))[0, 1]) < 0.15


def test_state_of_other_data_is_refused():
    state = make([(100, 1.0)]).state_dict()
    for other, why in (
        (make([(101, 1.0)]), "s0: its samples differ"),
        (make([(100, 1.0)], seed=1), "another order"),
        (make([(100, 1.0)], packing=False), "another order"),
        (make([(100, 1.0)], max_length=64), "another order"),
        (make([(100, 1.0)], curriculum="length"), "another order"),
    ):
        with pytest.raises(DataError, match=rf"{why}.*another output_dir"):
            other.load_state_dict(state)


def test_seek_at_a_hundred_billion_samples():
    """Any position of any epoch without a table of the set, for a few windows' work and memory."""
    stream = DataStream(
        [MixtureSource("large", Virtual(10**11)), MixtureSource("small", Virtual(10**6), 0.5)],
        seed=1,
        global_rows=8,
        max_length=512,
        packing=True,
        window=1024,
    )
    state = stream.state_dict()
    assert stream.total_steps(2) == pytest.approx(2 * 10**11 * 52 / 512 / 8, rel=0.02)
    assert not stream.counts_exactly(2)
    tracemalloc.start()
    times = []
    for epoch, window in ((0, 1), (5, stream.windows // 2), (10**4, stream.windows - 2)):
        stream.load_state_dict({**state, "epoch": epoch, "window": window})
        started = time.perf_counter()
        batch = stream.next_batch()
        times.append(time.perf_counter() - started)
        assert len(batch.rows) == 8
        assert batch.epoch == epoch
    assert max(times) < 1.0
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_sample_over_max_length_is_refused():
    with pytest.raises(DataError, match=r"32 tokens, but data\.max_length=16"):
        make([(1000, 1.0)], max_length=16).next_batch()


@given(streams, st.integers(1, 64), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_ranks_train_on_the_sequence_for_any_prefetch_depth(options, world, micro_rows, depth):
    """Real prefetch threads of some ranks of a world, each with a separate stream."""
    ranks = sorted({0, world // 2, world - 1})
    for rank in ranks:
        stream = make(**options)
        stream.store.gather = gather_lengths(stream.store)
        walked = make(**options)
        with Prefetcher(stream, rank=rank, world=world, micro_rows=micro_rows, depth=depth) as prefetcher:
            for _ in range(6):
                got, expected = next(prefetcher), walked.next_batch()
                assert got.batch == expected
                assert got.state_after == walked.state_dict()
                mine = deal(expected, rank=rank, world=world, micro_rows=micro_rows)
                assert [m.real_tokens for m in got.micro_batches] == [
                    sum(int(stream.store.lengths_of(np.array(row)).sum()) for row in rows) for rows in mine
                ]


def gather_lengths(store):
    def gather(ids):
        lengths = store.lengths_of(ids)
        return np.ones(lengths.sum(), np.int64), np.ones(lengths.sum(), np.bool_), lengths

    return gather


def test_rows_of_a_curriculum_go_from_short_to_long():
    stream = make([(2000, 1.0)], window=500, max_length=64, global_rows=1, curriculum="length")
    means = [batch.real_tokens / batch.samples for batch in epoch_of(stream, 0)]
    rows = [stream._count_rows(0, window) for window in range(stream.windows)]
    starts = np.cumsum([0, *rows])
    assert len(means) == starts[-1]
    assert stream.windows == 4
    for start, stop in pairwise(starts.tolist()):
        assert means[start:stop] == sorted(means[start:stop])
        assert means[stop - 1] > means[start] + 3


def test_steps_are_counted_only_as_far_as_needed(monkeypatch):
    stream = make([(10_000, 1.0)], window=100)
    assert stream.windows == 100
    exact = sum(stream.steps_in_epoch(epoch) for epoch in range(2))
    fresh = make([(10_000, 1.0)], window=100)
    assert fresh.total_steps(2, at_most=5) == 5
    assert len(fresh._row_counts) <= 2
    estimated = fresh.total_steps(2)
    assert len(fresh._row_counts) == COUNTED_WINDOWS
    assert estimated == pytest.approx(exact, rel=0.01)
    monkeypatch.setattr("ft_dist.data.stream.stream.COUNTED_WINDOWS", 200)
    assert fresh.total_steps(2) == exact
    assert fresh.counts_exactly(2)
    assert not fresh.counts_exactly(3)
