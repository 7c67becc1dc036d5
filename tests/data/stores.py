"""Sample stores in memory, for tests of the layers above the files."""

from collections.abc import Sequence

import numpy as np


class ListStore:
    """Samples as (tokens, mask) lists."""

    def __init__(self, samples: Sequence[tuple[list[int], list[bool]]], fingerprint: str = "list") -> None:
        self.samples = list(samples)
        self.fingerprint = fingerprint
        self.lengths = np.array([len(tokens) for tokens, _ in samples], np.uint32)
        self.labelled = np.array([sum(mask[1:]) for _, mask in samples], np.uint32)

    def __len__(self) -> int:
        return len(self.samples)

    def lengths_of(self, ids):
        return self.lengths[ids].astype(np.int64)

    def labelled_of(self, ids):
        return self.labelled[ids].astype(np.int64)

    def gather(self, ids):
        tokens = np.concatenate([np.array(self.samples[index][0], np.int64) for index in ids])
        mask = np.concatenate([np.array(self.samples[index][1], np.bool_) for index in ids])
        return tokens, mask, self.lengths_of(ids)

    def sequences_of(self, ids):
        return None

    def expect(self, ids):
        pass

    def close(self):
        pass


class Lengths(ListStore):
    """A store whose contents do not matter, only its lengths."""

    def __init__(self, size: int, longest: int = 32, seed: int = 0, fingerprint: str | None = None) -> None:
        self.fingerprint = fingerprint or f"{size}-{longest}-{seed}"
        self.lengths = np.random.default_rng(seed).integers(2, longest + 1, size).astype(np.uint32)
        self.labelled = self.lengths // 2

    def __len__(self) -> int:
        return len(self.lengths)

    def gather(self, ids):
        raise AssertionError("order needs no sample")


class Virtual:
    """A set too large to hold: lengths are a function of the id."""

    fingerprint = "virtual"

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def lengths_of(self, ids):
        return ids % 97 + 4

    def labelled_of(self, ids):
        return self.lengths_of(ids) // 2

    def gather(self, ids):
        raise AssertionError("order needs no sample")

    def expect(self, ids):
        assert len(ids) < 10**5


def random_store(samples: int, longest: int, seed: int = 0) -> ListStore:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest + 1, samples).tolist()
    halves = [[False] * (length // 2) + [True] * (length - length // 2) for length in lengths]
    tokens = [generator.integers(10, 90, length).tolist() for length in lengths]
    return ListStore(list(zip(tokens, halves, strict=True)), f"random-{samples}-{longest}-{seed}")
