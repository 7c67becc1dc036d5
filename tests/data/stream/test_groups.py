"""Sequences that belong together (a preference pair, n answers) are one sample, which nothing splits."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dist.data.encode.chunk import EncodedChunk, SourceCounts
from ft_dist.data.encode.minhash import BUCKETS, KEYS
from ft_dist.data.store import writer as writing
from ft_dist.data.store.store import JoinedStore, TokenStore
from ft_dist.data.store.writer import ShardWriter
from ft_dist.data.stream.batch import IGNORED, collate, deal
from ft_dist.data.stream.mixture import MixtureSource
from ft_dist.data.stream.stream import DataStream
from ft_dist.storage import open_storage
from tests.data.stores import ListStore

SAMPLES, MAX_LENGTH = 60, 48


def write(folder, *, grouped_chunks, samples=SAMPLES, seed=0):
    """A set in chunks of ten samples; each token is its sample's number. Every token of a sequence is a target."""
    generator = np.random.default_rng(seed)
    storage = open_storage(str(folder), wait_s=1.0)
    writer = ShardWriter(storage, fingerprint=f"set-{seed}", made_with={}, dtype=np.uint16)
    for chunk, first in enumerate(range(0, samples, 10)):
        grouped = chunk in grouped_chunks
        sequences = [generator.integers(2, 12, generator.integers(1, 4) if grouped else 1).tolist() for _ in range(10)]
        lengths = np.array([sum(one) for one in sequences], np.uint32)
        counts = SourceCounts(records=10, samples=10, tokens=int(lengths.sum()))
        encoded = EncodedChunk(
            tokens=np.repeat(np.arange(first, first + 10), lengths).astype(np.uint16),
            mask=np.ones(lengths.sum(), np.bool_),
            lengths=lengths,
            labelled=np.array([sum(one) - len(one) for one in sequences], np.uint32),
            keys=np.zeros((10, KEYS), np.uint64),
            signatures=np.zeros((10, BUCKETS), np.uint32),
            counts=counts,
        )
        writer.add(encoded, sequences=sequences if grouped else None)
    writer.flush_rest()
    writer.commit({})
    return TokenStore.open(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A grouped set with shards that have no groups, and one without any."""
    folder = tmp_path_factory.mktemp("groups")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "SHARD_TOKENS", 150)
        return [write(folder / "pairs", grouped_chunks={0, 2, 3}), write(folder / "plain", grouped_chunks=(), seed=1)]


def test_a_set_without_groups_has_the_same_files_and_keys(tmp_path):
    store = write(tmp_path / "plain", grouped_chunks=())
    assert not any(entry.grouped for entry in store.index.shards)
    content = (tmp_path / "plain" / store.index.shards[0].file).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert sorted(header) == ["mask", "offsets", "tokens"]
    assert store.sequences_of(np.arange(3)) is None
    assert collate([[0, 1]], store).groups is None


@given(st.lists(st.integers(0, 2 * SAMPLES - 1), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_sequences_follow_the_samples_asked_for(stores, ids):
    ids = np.array(ids, np.int64)
    joined = JoinedStore(stores)
    lengths = joined.lengths_of(ids)
    found = joined.sequences_of(ids)
    if found is None:
        assert (ids >= SAMPLES).all()
        return
    sequence_lengths, counts = found
    assert len(counts) == len(ids)
    assert np.add.reduceat(sequence_lengths, np.cumsum(counts) - counts).tolist() == lengths.tolist()
    assert joined.labelled_of(ids).tolist() == (lengths - counts).tolist()


@given(
    world=st.integers(1, 9),
    micro_rows=st.integers(1, 3),
    global_rows=st.integers(1, 12),
    packing=st.booleans(),
    stopped_after=st.integers(0, 5),
    seed=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_no_rank_row_or_resume_splits_a_group(stores, world, micro_rows, global_rows, packing, stopped_after, seed):
    """An epoch, resumed in its middle in another world, gives every sequence of every sample once, together."""

    def make():
        sources = [MixtureSource(f"source-{number}", store) for number, store in enumerate(stores)]
        return DataStream(
            sources, seed=seed, global_rows=global_rows, max_length=MAX_LENGTH, packing=packing, window=40
        )

    stream, seen = make(), []
    batches = 0
    while stream.epochs_done == 0:
        if batches == stopped_after:
            state, stream, world = stream.state_dict(), make(), world % 4 + 1
            stream.load_state_dict(state)
        batch = stream.next_batch()
        batches += 1
        dealt = [rows for rank in range(world) for rows in deal(batch, rank=rank, world=world, micro_rows=micro_rows)]
        micro_batches = [collate(rows, stream.store) for rows in dealt]
        assert sum(one.samples for one in micro_batches) == batch.samples
        assert sum(one.labelled_tokens for one in micro_batches) == batch.labelled_tokens
        for rows, one in zip(dealt, micro_batches, strict=True):
            ids = [sample for row in rows for sample in row]
            seen += ids
            if rows:
                check_groups(one, np.array(ids), stream.store)
    assert sorted(seen) == list(range(2 * SAMPLES))


def check_groups(batch, ids, store):
    if batch.groups is None:
        assert store.sequences_of(ids) is None
        return
    lengths, counts = store.sequences_of(ids)
    assert batch.groups.sample_of_sequence.bincount().tolist() == counts.tolist()
    assert batch.groups.sequence_of_label.bincount(minlength=len(lengths)).tolist() == (lengths - 1).tolist()
    # a token's label names its sample, so every label's sequence must belong to that sample
    labels = batch.labels[batch.labels != IGNORED]
    sample_of_label = batch.groups.sample_of_sequence[batch.groups.sequence_of_label]
    assert torch.equal(torch.from_numpy(ids % SAMPLES)[sample_of_label], labels)
    assert (batch.position_ids.amax() < lengths.max()).item()


def test_groups_move_with_their_batch(stores):
    moved = collate([[0, 1]], stores[0]).to("cpu")
    assert moved.groups is not None
    assert moved.inputs()["groups"] is moved.groups
    assert "groups" not in collate([[0]], ListStore([([1, 2], [True, True])])).inputs()
