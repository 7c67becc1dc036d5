"""Generated samples of chosen lengths; order, packing and batches are those of real training."""

import numpy as np

from ft_dist.data.store.store import BoolArray, Int64Array, end_to_end
from ft_dist.errors import UserError

SAMPLES = 200_000
SPREAD = 0.75
"""Standard deviation of the logarithm of lengths: about that of chat data"""
_SHORTEST = 8


class SyntheticStore:
    """A `SampleStore` of random tokens: every length is `max_length`, or log-normal around a median, up to
    `max_length`.

    The last `labelled` share of each sample is labelled.
    """

    def __init__(self, *, max_length: int, median: int | None, labelled: float, vocabulary: int, seed: int) -> None:
        numbers = np.random.default_rng(seed)
        if median is None:
            lengths = np.full(SAMPLES, max_length)
        else:
            lengths = np.clip(numbers.lognormal(np.log(median), SPREAD, SAMPLES), _SHORTEST, max_length)
        self._lengths: Int64Array = lengths.astype(np.int64)
        self._labelled: Int64Array = np.clip((self._lengths * labelled).astype(np.int64), 1, self._lengths - 1)
        self._pool: Int64Array = numbers.integers(0, vocabulary, 1 << 20)
        self.fingerprint = f"synthetic {max_length} {median} {labelled} {vocabulary} {seed}"

    def __len__(self) -> int:
        return SAMPLES

    def lengths_of(self, ids: Int64Array) -> Int64Array:
        return self._lengths[ids]

    def labelled_of(self, ids: Int64Array) -> Int64Array:
        return self._labelled[ids]

    def gather(self, ids: Int64Array) -> tuple[Int64Array, BoolArray, Int64Array]:
        """(tokens (T,), mask (T,), lengths (samples,))."""
        lengths = self._lengths[ids]
        positions = end_to_end(np.zeros_like(lengths), lengths)
        starts = np.repeat(ids * 977, lengths)
        mask: BoolArray = positions >= np.repeat(lengths - self._labelled[ids], lengths)
        return self._pool[(starts + positions) % len(self._pool)], mask, lengths

    def sequences_of(self, ids: Int64Array) -> None:
        """Every sample is one sequence."""

    def expect(self, ids: Int64Array) -> None:
        """Nothing to fetch."""

    def close(self) -> None:
        """Nothing to interrupt."""


class VocabularyOnly:
    """A stand-in for the tokenizer, as no text is read."""

    pad_token_id = 0

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def median_of(lengths: str) -> int | None:
    """`full` (every sample fills a row) is None, a number the median of a log-normal. Raises UserError."""
    if lengths == "full":
        return None
    if lengths.isdigit() and int(lengths) >= _SHORTEST:
        return int(lengths)
    raise UserError(f"--lengths {lengths}: must be full, or a median of at least {_SHORTEST} tokens such as 300.")
