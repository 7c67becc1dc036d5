"""The keyed permutation is a bijection at every size, and mixes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dist.data.stream.order import BlockPermutation, Permutation, shuffled

some = settings(max_examples=60, deadline=None)


@given(size=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 100)))
@some
def test_bijection_at_every_small_size(size, key):
    order = Permutation(size, key).take(0, size)
    assert np.array_equal(np.sort(order), np.arange(size))


@given(
    size=st.integers(10**6, 10**11),
    key=st.integers(0, 2**63 - 1),
    data=st.data(),
)
@some
def test_large_sizes_stay_in_range_and_never_collide(size, key, data):
    start = data.draw(st.integers(0, size - 5000))
    permutation = Permutation(size, (key,))
    order = permutation.take(start, start + 5000)
    assert order.min() >= 0
    assert order.max() < size
    assert len(np.unique(order)) == 5000
    assert permutation[start + 17] == order[17]


@given(size=st.integers(1, 10**9), start=st.integers(0, 10**9), length=st.integers(1, 300))
@some
def test_one_position_and_a_range_agree(size, start, length):
    start = min(start, size - 1)
    stop = min(size, start + length)
    permutation = Permutation(size, (1, "epoch", 2))
    assert permutation.take(start, stop)[-1] == permutation[stop - 1]


def test_whole_range_at_a_million():
    order = Permutation(1_000_003, (7, 1)).take(0, 1_000_003)
    assert np.array_equal(np.sort(order), np.arange(1_000_003))


@pytest.mark.parametrize("size", [1_000, 65_537, 1_000_000])
def test_places_are_uniform(size):
    """Chi-square over a 10 x 10 grid of (position, value): 81 degrees of freedom; 150 is 5 sigma out."""
    for key in range(5):
        order = Permutation(size, (key,)).take(0, size)
        grid, _, _ = np.histogram2d(np.arange(size), order, bins=10)
        expected = size / 100
        assert ((grid - expected) ** 2 / expected).sum() < 150


@pytest.mark.parametrize("size", [1_000, 65_537, 1_000_000])
@pytest.mark.parametrize("lag", [1, 2, 16])
def test_neighbours_are_not_correlated(size, lag):
    order = Permutation(size, (3, "epoch", 0)).take(0, size).astype(float)
    assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / np.sqrt(size)


def test_small_sizes_reach_every_permutation():
    """All 24 orders of four samples occur, none far more often than another (2400 keys; sigma of a count is 10)."""
    seen: dict[tuple[int, ...], int] = {}
    for key in range(2400):
        order = tuple(Permutation(4, (key,)).take(0, 4).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert max(seen.values()) < 160
    assert min(seen.values()) > 50


def test_keys_give_independent_orders():
    a, b = (Permutation(10_000, (5, "epoch", epoch)).take(0, 10_000) for epoch in (0, 1))
    assert np.count_nonzero(a == b) < 10
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


def test_out_of_range_is_an_index_error():
    with pytest.raises(IndexError):
        Permutation(5, (0,))[5]


@given(size=st.integers(1, 3000), shuffle=st.integers(16, 700), key=st.integers(0, 2**63 - 1))
@some
def test_two_levels_are_a_bijection(size, shuffle, key):
    order = BlockPermutation(size, (key,), shuffle).at(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))


@given(size=st.integers(2**20, 10**11), key=st.integers(0, 2**63 - 1), data=st.data())
@some
def test_two_levels_at_any_size_come_from_few_blocks(size, key, data):
    """Any position of 10^11, without a table; a group's positions are in 16 blocks, neighbours far from each other."""
    shuffle = data.draw(st.sampled_from([2**16, 2**18]))
    order = BlockPermutation(size, (key,), shuffle)
    group = data.draw(st.integers(0, (size - 1) // shuffle - 1))
    start = group * shuffle + data.draw(st.integers(0, shuffle - 5000))
    places = order.at(np.arange(start, start + 5000))
    assert len(np.unique(places)) == 5000
    assert places.min() >= 0
    assert places.max() < size
    assert len(np.unique(places // (shuffle // 16))) <= 16
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.1
    assert order.at(np.array([start + 17]))[0] == places[17]


def test_two_levels_shuffle_the_whole_range():
    order = BlockPermutation(1_000_000, (7,), 20_000).at(np.arange(1_000_000))
    grid, _, _ = np.histogram2d(np.arange(1_000_000), order, bins=10)
    # blocks of 1250 are shuffled over the range: 100 of them are in a tenth, 10 in a cell
    assert grid.min() > 0
    assert abs(np.corrcoef(np.arange(1_000_000), order)[0, 1]) < 0.15


def test_small_sets_are_shuffled_as_one():
    assert isinstance(shuffled(1000, (1,), 1000), Permutation)
    assert isinstance(shuffled(1001, (1,), 1000), BlockPermutation)
