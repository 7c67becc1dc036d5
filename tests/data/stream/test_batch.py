"""Rows become tensors with shifted labels, and every rank gets the same number of micro-batches."""

import pytest
import torch

from ft_dist.bench.synthetic import SyntheticStore
from ft_dist.data.stream.batch import IGNORED, Prefetcher, collate, deal
from ft_dist.data.stream.mixture import MixtureSource
from ft_dist.data.stream.stream import DataStream
from ft_dist.errors import DataError
from tests.data.stores import ListStore, random_store


def test_labels_are_shifted_and_never_cross_samples():
    store = ListStore([([1, 2, 3], [False, True, True]), ([4, 5], [True, True]), ([6, 7, 8], [False, False, True])])
    got = collate([[0, 1], [2]], store, pad_id=99)
    X = IGNORED
    assert got.input_ids.tolist() == [[1, 2, 3, 4, 5, 99, 99, 99], [6, 7, 8, 99, 99, 99, 99, 99]]
    assert got.labels.tolist() == [[2, 3, X, 5, X, X, X, X], [X, 8, X, X, X, X, X, X]]
    assert got.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert (got.real_tokens, got.labelled_tokens, got.padded_tokens) == (8, 4, 8)
    assert got.kept.tolist() == [0, 1, 2, 3, 4, 5, 8, 9]  # labelled tokens, those before them, and three spare ones
    assert got.labelled.tolist() == [0, 1, 3, 7]
    assert got.labels.view(-1)[got.kept][got.labelled].tolist() == [2, 3, 5, 8]
    assert got.input_ids.dtype == got.labels.dtype == got.position_ids.dtype == torch.int64


def test_a_dummy_has_no_labels():
    got = collate([], random_store(1, 4), pad_id=7)
    assert got.input_ids.tolist() == [[7]]
    assert got.labels.tolist() == [[IGNORED]]
    assert got.kept.tolist() == [0]
    assert got.labelled.tolist() == []
    assert (got.real_tokens, got.labelled_tokens, got.padded_tokens) == (0, 0, 1)


def test_shapes_on_a_gpu_do_not_vary_with_lengths():
    """Twenty steps of packed chats give kernels, allocator and matrix products few shapes."""
    store = SyntheticStore(max_length=4096, median=300, labelled=0.5, vocabulary=1000, seed=0)
    stream = DataStream([MixtureSource("chats", store)], seed=0, global_rows=2, max_length=4096, packing=True)
    seen = set()
    for _ in range(20):
        got = collate(stream.next_batch().rows, store, gpu_length=4096)
        sizes = len(got.segments.query_ends), got.segments.longest_queries, got.segments.longest_keys
        seen.add((got.input_ids.shape, len(got.kept), *sizes))
    assert len(seen) <= 4, seen
    assert {shape[1] for shape in seen} == {8192}


@pytest.mark.parametrize("packing", [True, False])
def test_lengths_on_a_gpu_are_sixteenths_of_the_longest(packing):
    store = random_store(300, 700)
    stream = DataStream([MixtureSource("a", store)], seed=1, global_rows=3, max_length=1000, packing=packing)
    for _ in range(10):
        rows = stream.next_batch().rows
        got, on_cpu = collate(rows, store, gpu_length=1000), collate(rows, store)
        assert got.input_ids.shape[1] % 64 == 0
        assert got.input_ids.shape[1] < on_cpu.input_ids.shape[1] + 64
        assert len(got.kept) % (3 * 64) == 0
        assert len(got.kept) < len(on_cpu.kept) + 3 * 64
        width = on_cpu.input_ids.shape[1]
        assert torch.equal(got.labels[:, :width], on_cpu.labels)
        assert (got.labelled_tokens, got.real_tokens) == (on_cpu.labelled_tokens, on_cpu.real_tokens)
        assert got.real_tokens + got.padded_tokens == got.input_ids.numel()
        labelled = got.labels.flatten() != IGNORED
        assert labelled[got.kept].sum() == labelled.sum()


def test_a_dummy_on_a_gpu_has_the_shortest_row_length():
    got = collate([], random_store(1, 4), pad_id=7, gpu_length=4096)
    assert torch.equal(got.input_ids, torch.full((1, 256), 7))
    assert (got.labels == IGNORED).all()
    assert len(got.kept) == 256
    assert got.segments.query_ends.tolist() == [0, 1, 256]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 7, 8, 64])
def test_deal_gives_every_row_once_and_every_rank_the_same_number_of_micro_batches(world, packing):
    store = random_store(100, 50)
    stream = DataStream([MixtureSource("a", store)], seed=1, global_rows=16, max_length=50, packing=packing)
    for _ in range(8):
        batch = stream.next_batch()
        for micro_rows in (1, 2, 5):
            dealt = [deal(batch, rank=rank, world=world, micro_rows=micro_rows) for rank in range(world)]
            assert len({len(micro_batches) for micro_batches in dealt}) == 1
            assert all(len(rows) <= micro_rows for micro_batches in dealt for rows in micro_batches)
            rows = [row for micro_batches in dealt for rows in micro_batches for row in rows]
            assert sorted(rows) == sorted(batch.rows)
            collated = [collate(rows, store) for micro_batches in dealt for rows in micro_batches]
            assert sum(one.labelled_tokens for one in collated) == batch.labelled_tokens
            assert sum(one.real_tokens for one in collated) == batch.real_tokens


def test_deal_balances_tokens():
    store = random_store(2000, 500)
    stream = DataStream([MixtureSource("a", store)], seed=1, global_rows=64, max_length=500, packing=False)
    batch = stream.next_batch()
    tokens = [
        sum(store.lengths[sample] for rows in deal(batch, rank=rank, world=4, micro_rows=2) for (sample,) in rows)
        for rank in range(4)
    ]
    assert max(tokens) < 1.05 * min(tokens)


def test_prefetched_state_is_the_position_after_its_own_batch():
    def make() -> DataStream:
        return DataStream(
            [MixtureSource("a", random_store(50, 20))], seed=3, global_rows=4, max_length=32, packing=True
        )

    walked = make()
    with Prefetcher(make(), rank=1, world=2, micro_rows=1, depth=3) as prefetcher:
        for _ in range(30):
            got = next(prefetcher)
            expected = walked.next_batch()
            assert got.batch == expected
            assert got.state_after == walked.state_dict()
            assert len(got.micro_batches) == len(deal(expected, rank=1, world=2, micro_rows=1))


def test_error_on_the_thread_reaches_the_consumer():
    class Broken(ListStore):
        def gather(self, ids):
            raise OSError("disk gone")

    store = Broken([([1, 2], [True, True])] * 3)
    stream = DataStream([MixtureSource("a", store)], seed=0, global_rows=2, max_length=8, packing=False)
    prefetcher = Prefetcher(stream, rank=0, world=1, micro_rows=1)
    with pytest.raises(OSError, match="disk gone"):
        next(prefetcher)
    assert not prefetcher._thread.is_alive()
    prefetcher.close()


def test_an_error_in_a_ranks_own_rows_is_delivered_with_dummies_and_ends_the_batches():
    """Other ranks can read their rows and wait for this one in the step."""

    class Damaged(ListStore):
        def gather(self, ids):
            raise DataError("tokens-00001: damaged")

    store = Damaged([([1, 2, 3], [True] * 3)] * 24)
    stream = DataStream([MixtureSource("a", store)], seed=0, global_rows=8, max_length=64, packing=False)
    with Prefetcher(stream, rank=0, world=2, micro_rows=2) as prefetcher:
        batch = next(prefetcher)
        assert batch.given_up
        assert str(batch.error) == "tokens-00001: damaged"
        assert [micro_batch.labelled_tokens for micro_batch in batch.micro_batches] == [0, 0]
        with pytest.raises(DataError, match="tokens-00001: damaged"):
            next(prefetcher)
