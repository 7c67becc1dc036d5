"""The computed tokens cover every label with its full prefix, and few others."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dist.data.stream.prefixes import needed_tokens

sample = st.tuples(
    st.lists(st.integers(0, 2), min_size=1, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12)
)


def laid(samples):
    """Concatenated samples, then three padding tokens; a sample's last flag belongs to a token that nothing follows."""
    tokens = [token for ids, _ in samples for token in ids] + [0] * 3
    predicts = [flag and place < len(ids) - 1 for ids, flags in samples for place, flag in enumerate(flags[: len(ids)])]
    positions = [place for ids, _ in samples for place in range(len(ids))] + [0] * 3
    return np.array(tokens), np.array(predicts + [False] * 3), np.array(positions)


@settings(max_examples=300, deadline=None)
@given(st.lists(sample, min_size=1, max_size=8), st.sampled_from([1, 4, 8]))
def test_every_label_has_its_token_after_its_full_prefix(samples, round_to):
    tokens, predicts, positions = laid(samples)
    needed = needed_tokens(tokens, predicts, positions, round_to=round_to)
    kept, segments = needed.kept.numpy(), needed.segments
    assert np.array_equal(kept, np.unique(kept))
    assert set(np.flatnonzero(predicts)) <= set(kept.tolist())
    # each segment is a prefix of a sample, with every token at its position
    found, at, at_query = [], 0, 0
    for count, begin, longest in segments.shapes:
        for _ in range(count):
            keys = segments.keys[at : at + longest]
            assert torch.equal(segments.queries[at_query : at_query + longest - begin], keys[begin:])
            at_query += longest - begin
            run = kept[keys.numpy()]
            place = np.arange(longest)
            ends = np.flatnonzero(positions[run] != place)
            length = int(ends[0]) if len(ends) else longest
            found.append((tokens[run[:length]].tolist(), run[:length]))
            at += longest
    labelled = {int(place): False for place in np.flatnonzero(predicts)}
    for place in labelled:
        start = place - int(positions[place])
        beginning = tokens[start : place + 1].tolist()
        labelled[place] = any(
            ids[: len(beginning)] == beginning and run[len(beginning) - 1] == place for ids, run in found
        )
    assert all(labelled.values())
    spare = len(tokens) - len(kept)
    assert len(kept) % round_to == 0 or spare == 0


@settings(max_examples=300, deadline=None)
@given(st.lists(sample, min_size=1, max_size=8), st.sampled_from([1, 4, 8, 16]))
def test_every_label_has_its_token_after_its_full_prefix_on_a_gpu(samples, round_to):
    tokens, predicts, positions = laid(samples)
    needed = needed_tokens(tokens, predicts, positions, round_to=round_to, ragged=True)
    kept, segments = needed.kept.numpy(), needed.segments
    assert np.array_equal(kept, np.unique(kept))
    assert len(kept) % round_to == 0 or len(kept) == len(tokens)
    on_cpu = needed_tokens(tokens, predicts, positions, round_to=1)
    assert len(kept) - len(on_cpu.kept) < round_to
    keys = kept if segments.keys is None else kept[segments.keys.numpy()]
    query_ends, key_ends = segments.query_ends.tolist(), segments.key_ends.tolist()
    assert query_ends[-1] == len(kept)
    found = {}
    for start, end, key_start, key_end in zip(query_ends, query_ends[1:], key_ends, key_ends[1:], strict=False):
        run = keys[key_start:key_end]
        assert np.array_equal(run[len(run) - (end - start) :], kept[start:end])
        found |= {int(place): tokens[run[: at + 1]].tolist() for at, place in enumerate(run)}
    for place in np.flatnonzero(predicts).tolist():
        assert found[place] == tokens[place - positions[place] : place + 1].tolist()


def test_on_a_gpu_spare_tokens_form_few_runs():
    """Many samples end in one unlabelled token; the padding is one long run, which is used instead."""
    tokens, positions = np.ones(120, np.int64), np.append(np.tile(np.arange(10), 8), np.zeros(40, np.int64))
    predicts = np.append(np.tile(np.arange(10) < 9, 8), np.zeros(40, np.bool_))
    needed = needed_tokens(tokens, predicts, positions, round_to=100, ragged=True)
    assert needed.segments.query_ends.tolist()[:10] == [*range(0, 73, 9), 100]


def test_a_shared_prefix_runs_once_and_nothing_after_the_last_label():
    F, T = False, True
    tokens = np.array([5, 6, 7, 1, 2, 9, 5, 6, 7, 3, 4, 9, 5, 6, 8, 4, 9, 9])
    predicts = np.array([F, F, F, T, F, F] * 2 + [F, F, F, T, F, F])
    needed = needed_tokens(tokens, predicts, np.tile(np.arange(6), 3), round_to=1)
    # 5 6 7 1, 3 for the second sample, 8 4 for the third
    assert sorted(tokens[needed.kept.numpy()].tolist()) == [1, 3, 4, 5, 6, 7, 8]
    segments = needed.segments
    assert len(segments.queries) - len(segments.unread) == 7
    assert segments.shapes == ((3, 2, 4), (1, 0, 3))


def test_labelled_tokens_are_never_shared():
    tokens, predicts = np.array([1, 2, 3, 4] * 2), np.array([True, True, True, False] * 2)
    needed = needed_tokens(tokens, predicts, np.tile(np.arange(4), 2), round_to=1)
    assert needed.kept.tolist() == [0, 1, 2, 4, 5, 6]


def test_short_shared_prefixes_are_not_shared():
    tokens = np.concatenate([[1, *range(10 * n, 10 * n + 39)] for n in range(1, 4)])
    predicts = np.zeros(120, bool)
    predicts[[38, 78, 118]] = True
    needed = needed_tokens(tokens, predicts, np.tile(np.arange(40), 3), round_to=8)
    assert len(needed.kept) == 120
    assert len(needed.segments.copies) == 0


def test_without_a_label_one_token_runs():
    needed = needed_tokens(np.array([4, 5]), np.zeros(2, bool), np.array([0, 1]), round_to=1)
    assert needed.kept.tolist() == [0]
