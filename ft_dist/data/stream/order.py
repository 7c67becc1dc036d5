"""A keyed permutation of [0, size) that needs no table: any position of any epoch in O(1) time and memory.

A Feistel network permutes the smallest range of whole bits that holds `size`; indices that land outside are permuted
again until they land inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The
range is less than twice `size`, so that takes less than two rounds on average. The round function is MurmurHash3's
64-bit finaliser. This shuffles, it does not encrypt.

A large set is permuted in two levels, so a cache that holds a small part of it serves long runs of the order.
"""

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_ROUNDS = 10  # even, so the two halves end with their original widths; 6 already pass the mixing tests
_U64 = np.uint64

BLOCKS_PER_GROUP = 16


class Permutation:
    """A bijection of [0, size), a function of `size` and `key` alone. `key` is a tuple of integers and strings."""

    def __init__(self, size: int, key: tuple[int | str, ...]) -> None:
        assert 0 < size < 2**62, f"size={size}"
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low_bits = bits // 2
        self._high_bits = bits - self._low_bits
        digest = hashlib.blake2b(repr((size, *key)).encode(), digest_size=64).digest()
        digest += hashlib.blake2b(digest, digest_size=64).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")[:_ROUNDS].astype(_U64)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return int(self.at(np.array([index], np.int64))[0])

    def take(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The images of positions start .. stop - 1, int64."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The images of these positions, int64, same shape. Positions must be in [0, size)."""
        values = self._permute(indices.astype(_U64))
        outside = np.flatnonzero(values >= _U64(self.size))
        while outside.size:
            walked = self._permute(values[outside])
            values[outside] = walked
            outside = outside[walked >= _U64(self.size)]
        return values.astype(np.int64)

    def _permute(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left_bits, right_bits = self._high_bits, self._low_bits
        left = values >> _U64(right_bits)
        right = values & _U64((1 << right_bits) - 1)
        for key in self._keys:
            left, right = right, left ^ (_mix(right, key) & _U64((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left << _U64(right_bits)) | right


class BlockPermutation:
    """A bijection of [0, size) that maps neighbouring positions to few regions of the range.

    Blocks of shuffle_samples / 16 consecutive indices are permuted by the key (a short last block stays last); the
    indices of each group of 16 blocks are permuted together. So shuffle_samples consecutive positions map to 16
    stretches of the range, or 32 where they span two groups.
    """

    def __init__(self, size: int, key: tuple[int | str, ...], shuffle_samples: int) -> None:
        assert shuffle_samples >= BLOCKS_PER_GROUP, f"shuffle_samples={shuffle_samples}"
        self.size = size
        self._key = key
        self._block = shuffle_samples // BLOCKS_PER_GROUP
        self._group = self._block * BLOCKS_PER_GROUP
        self._whole_blocks = size // self._block
        self._blocks = Permutation(self._whole_blocks, (*key, "blocks")) if self._whole_blocks else None
        self._in_group = lru_cache(maxsize=8)(self._group_permutation)

    def at(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The images of these positions, int64, same shape (n,). Positions must be in [0, size)."""
        group_of = indices // self._group
        places = np.empty_like(indices)
        for group in np.unique(group_of).tolist():
            mine = np.flatnonzero(group_of == group)
            start = group * self._group
            places[mine] = self._in_group(group).at(indices[mine] - start) + start
        block_of = places // self._block
        whole = np.flatnonzero(block_of < self._whole_blocks)
        if self._blocks is not None:
            places[whole] += (self._blocks.at(block_of[whole]) - block_of[whole]) * self._block
        return places

    def _group_permutation(self, group: int) -> Permutation:
        size = min(self._group, self.size - group * self._group)
        return Permutation(size, (*self._key, "group", group))


def shuffled(size: int, key: tuple[int | str, ...], shuffle_samples: int) -> Permutation | BlockPermutation:
    """The order of a set: one permutation up to `shuffle_samples`, in two levels above."""
    return Permutation(size, key) if size <= shuffle_samples else BlockPermutation(size, key, shuffle_samples)


def _mix(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    values = values ^ key
    values ^= values >> _U64(33)
    values *= _U64(0xFF51AFD7ED558CCD)
    values ^= values >> _U64(33)
    values *= _U64(0xC4CEB9FE1A85EC53)
    values ^= values >> _U64(33)
    return values
