"""Rows never overflow, nothing is lost, and rows are full."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dist.data.packing import DEFAULT_WINDOW, pack_window

some = settings(max_examples=60, deadline=None)


@given(st.integers(8, 500).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=300))))
@some
def test_every_sample_once_within_capacity(case):
    capacity, lengths = case
    rows = pack_window(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= capacity for row in rows)
    assert rows == pack_window(np.array(lengths, np.int64), capacity)
    # no two rows could be one: best fit opens a row only where none has room
    spaces = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(spaces) < 2 or spaces[0] + spaces[1] > capacity


def best_fit_by_search(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing as written in a textbook."""
    rows: list[list[int]] = []
    used: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row in range(len(rows)) if used[row] + lengths[index] <= capacity]
        if fitting:
            row = max(fitting, key=lambda row: used[row])
        else:
            row = len(rows)
            rows.append([])
            used.append(0)
        rows[row].append(index)
        used[row] += lengths[index]
    return rows


@given(st.lists(st.integers(1, 64), max_size=120))
@some
def test_as_many_rows_as_the_textbook_form(lengths):
    assert len(pack_window(lengths, 64)) == len(best_fit_by_search(lengths, 64))


def test_log_normal_lengths_fill_rows():
    """Alpaca-like lengths (median 90, some ten times that) at 2048 tokens: at least 99.5% of each row is real."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(4.5, 0.8, 52_000), 8, 2048).astype(np.int64)
    rows = sum(len(pack_window(lengths[at : at + DEFAULT_WINDOW], 2048)) for at in range(0, 52_000, DEFAULT_WINDOW))
    assert lengths.sum() / (rows * 2048) >= 0.995


def test_large_windows_pack_fast():
    lengths = np.random.default_rng(0).integers(1, 4096, 100_000)
    started = time.perf_counter()
    pack_window(lengths, 32_768)
    assert time.perf_counter() - started < 5.0
