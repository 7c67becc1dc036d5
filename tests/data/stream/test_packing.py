"""Rows never overflow, no sample is lost, and rows are full."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_dist.data.stream.packing import DEFAULT_WINDOW, pack_window

some = settings(max_examples=60, deadline=None)


@given(st.integers(8, 500).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=300))))
@some
def test_every_sample_once_within_capacity(case):
    capacity, lengths = case
    rows = pack_window(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= capacity for row in rows)
    assert rows == pack_window(np.array(lengths, np.int64), capacity)


def best_fit_by_search(lengths: list[int], capacity: int) -> list[list[int]]:
    """Textbook best-fit decreasing."""
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
def test_never_more_rows_than_best_fit_decreasing(lengths):
    assert len(pack_window(lengths, 64)) <= len(best_fit_by_search(lengths, 64))


def fullness(lengths: np.ndarray, capacity: int) -> float:
    """Share of real tokens over whole windows."""
    used = rows = 0
    for at in range(0, len(lengths) - DEFAULT_WINDOW + 1, DEFAULT_WINDOW):
        window = lengths[at : at + DEFAULT_WINDOW]
        used, rows = used + int(window.sum()), rows + len(pack_window(window, capacity))
    return used / (rows * capacity)


@pytest.mark.parametrize("median", [90, 150, 250])
def test_log_normal_lengths_fill_rows(median):
    """Alpaca-like lengths, some ten times the median."""
    generator = np.random.default_rng(median)
    lengths = np.clip(generator.lognormal(np.log(median), 0.8, 33_000), 8, 2048).astype(np.int64)
    assert fullness(lengths, 2048) >= 0.995


@pytest.mark.parametrize("median, sigma, shortest", [(204, 0.3, 97), (49, 0.2, 38)])
def test_narrow_lengths_fill_rows(median, sigma, shortest):
    """As in GSM8K and Banking77. Best-fit decreasing stays below 99%, because its last rows hold only small samples."""
    generator = np.random.default_rng(median)
    lengths = np.maximum(generator.lognormal(np.log(median), sigma, 17_000), shortest).astype(np.int64)
    assert fullness(lengths, 2048) >= 0.995


def test_the_work_of_a_window_is_linear_in_its_samples():
    """Scanning the open rows would take 64 times as long for eight times the samples."""
    lengths = np.random.default_rng(0).integers(1, 4096, 80_000)

    def processor_s(samples: int) -> float:
        started = time.process_time()
        pack_window(lengths[:samples], 32_768)
        return time.process_time() - started

    processor_s(1000)
    assert processor_s(80_000) < 30 * min(processor_s(10_000) for _ in range(3))
