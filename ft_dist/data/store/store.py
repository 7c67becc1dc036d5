"""Tokenised samples on disk, memory-mapped: safetensors shards, a file of their lengths, and an `index.json`.

A shard holds `tokens` (uint16 or uint32, the samples end to end), `mask` (one bit per token, set where the loss counts
it, `numpy.packbits` order) and `offsets` (int64, samples + 1). A shard with groups (index key `grouped`) also holds
`sequence_lengths` (uint32) and `sequence_offsets` (int64, samples + 1), which cut samples into sequences.
`lengths.safetensors` holds `lengths` and `labelled` (uint32, tokens and targets of every sample of the set), which is
all that order and packing read. The index (index.py) lists the files with their bytes and BLAKE2b checksums. It is
written after every file it names (writer.py), so a set with an index is complete or was damaged later; `open` detects
a wrong size, and the first use of a file a wrong byte.

`ShardFiles` hides where the files come from: a local folder (local.py), or a cache of a remote one (cache.py).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ft_dist.data.store.arrays import map_arrays
from ft_dist.data.store.index import SetIndex, ShardEntry
from ft_dist.data.store.local import LocalFolder
from ft_dist.errors import DataError
from ft_dist.storage import Storage, open_storage

OPEN_SHARDS = 64
"""Shards mapped at a time; the least recently used is unmapped first"""

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class SampleStore(Protocol):
    """Samples by index, as order, packing and collation need them. `ids` are int64 arrays in any order."""

    @property
    def fingerprint(self) -> str:
        """Stores with equal fingerprints hold equal samples."""
        ...

    def __len__(self) -> int: ...

    def lengths_of(self, ids: Int64Array) -> Int64Array:
        """Tokens of each sample."""
        ...

    def labelled_of(self, ids: Int64Array) -> Int64Array:
        """Targets of each sample: masked tokens that are not the first of their sequence."""
        ...

    def gather(self, ids: Int64Array) -> tuple[Int64Array, BoolArray, Int64Array]:
        """(tokens (T,), mask (T,), lengths (samples,)) of the samples end to end."""
        ...

    def sequences_of(self, ids: Int64Array) -> tuple[Int64Array, Int64Array] | None:
        """(tokens of each sequence end to end, sequences of each sample); None if every sample is one sequence.

        A sample of several sequences is a group, such as a preference pair: order, packing and ranks never split it.
        """
        ...

    def expect(self, ids: Int64Array) -> None:
        """A hint: these samples will be gathered soon."""
        ...

    def close(self) -> None:
        """Stop; a `gather` that waits in another thread fails."""
        ...


class ShardFiles(Protocol):
    """Access to the files of one set."""

    index: SetIndex

    def path(self, file: str) -> Path:
        """The path of a file of the set on this machine's disk; waits until it is present and intact.

        Raises DataError or StorageError if that fails.
        """
        ...

    def expect(self, files: Sequence[str]) -> None:
        """A hint: these files are requested next, in this order. Returns immediately."""
        ...

    def raise_if_damaged(self) -> None:
        """Raises DataError if a file that was intact is not any more."""
        ...

    def forget(self) -> None:
        """Compare every file with its checksum again at its next request."""
        ...

    def close(self) -> None:
        """Stop; a thread that waits for a file fails."""
        ...


class TokenStore:
    """One prepared set, opened read-only by memory map; shards are mapped on first use.

    lengths, labelled: (samples,) uint32 memory maps, tokens and targets of each sample.
    """

    def __init__(self, files: ShardFiles, name: str) -> None:
        """`name` appears in error messages. Raises DataError if the set is incomplete or damaged."""
        self.index = files.index
        self.name = name
        self._files = files
        self._shards: list[ShardEntry] = self.index.shards
        self._grouped = any(entry.grouped for entry in self._shards)
        self._starts = np.zeros(len(self._shards) + 1, np.int64)
        np.cumsum([shard.samples for shard in self._shards], out=self._starts[1:])
        self.lengths, self.labelled = self._map_lengths()
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._map)

    @classmethod
    def open(cls, place: str | Path | Storage) -> "TokenStore":
        """Map a finished set in a local folder. Raises DataError if it is missing, has another version, or a file has
        the wrong size."""
        storage = place if isinstance(place, Storage) else open_storage(place)
        return cls(LocalFolder(storage), storage.url)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        return sum(entry.bytes for entry in self.index.files)

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint

    def lengths_of(self, ids: Int64Array) -> Int64Array:
        return self.lengths[ids].astype(np.int64)

    def labelled_of(self, ids: Int64Array) -> Int64Array:
        return self.labelled[ids].astype(np.int64)

    def gather(self, ids: Int64Array) -> tuple[Int64Array, BoolArray, Int64Array]:
        """(tokens, mask, lengths) of the samples end to end, copied out of the maps.

        Raises DataError naming a shard that is missing or damaged.
        """
        lengths = self.lengths_of(ids)
        shard_of = np.searchsorted(self._starts, ids, side="right") - 1
        return gather_parts(
            shard_of, lengths, lambda number, mine: self._gather_shard(number, ids[mine], lengths[mine])
        )

    def sequences_of(self, ids: Int64Array) -> tuple[Int64Array, Int64Array] | None:
        if not self._grouped:
            return None
        shard_of = np.searchsorted(self._starts, ids, side="right") - 1
        return join_sequences(
            shard_of, self.lengths_of(ids), lambda number, mine: self._sequences_in(number, ids[mine])
        )

    def sample(self, index: int) -> tuple[Int64Array, BoolArray]:
        """(tokens int64, mask bool) of one sample."""
        tokens, mask, _ = self.gather(np.array([index], np.int64))
        return tokens, mask

    def expect(self, ids: Int64Array) -> None:
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        first_use = np.unique(numbers, return_index=True)[1]
        self._files.expect([self._shards[numbers[at]].file for at in np.sort(first_use)])

    def close(self) -> None:
        self._files.close()

    def verify(self) -> None:
        """Read every byte, and compare the files with each other. Raises DataError naming one that is damaged."""
        self._files.forget()
        self._map_lengths()
        for number in range(len(self._shards)):
            self._map(number)

    def _gather_shard(self, number: int, ids: Int64Array, lengths: Int64Array) -> tuple[Int64Array, BoolArray]:
        self._files.raise_if_damaged()
        shard = self._shard(number)
        at = end_to_end(shard["offsets"][ids - self._starts[number]], lengths)
        bits = shard["mask"][at >> 3] >> (7 - (at & 7)).astype(np.uint8)
        return shard["tokens"][at].astype(np.int64), (bits & 1).astype(np.bool_)

    def _sequences_in(self, number: int, ids: Int64Array) -> tuple[Int64Array, Int64Array] | None:
        if not self._shards[number].grouped:
            return None
        shard = self._shard(number)
        at = ids - self._starts[number]
        firsts, counts = shard["sequence_offsets"][at], np.diff(shard["sequence_offsets"])[at]
        return shard["sequence_lengths"][end_to_end(firsts, counts)].astype(np.int64), counts

    def _map_lengths(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        entry = self.index.lengths
        arrays = self._arrays(entry.file, {"lengths": ("u4",), "labelled": ("u4",)})
        lengths, labelled = arrays["lengths"], arrays["labelled"]
        if not len(lengths) == len(labelled) == self._starts[-1]:
            raise self._damaged(entry.file, "it does not hold as many samples as the index says")
        if not (labelled < lengths).all():  # so no length is 0
            raise self._damaged(entry.file, "a sample has more targets than tokens")
        sums = np.add.reduceat(lengths, self._starts[:-1], dtype=np.int64)
        if not np.array_equal(sums, [shard.tokens for shard in self._shards]):  # before any is used as a size
            raise self._damaged(entry.file, "its samples do not fill the shards")
        return lengths, labelled

    def _map(self, number: int) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a shard; whoever indexes them stays inside. Raises DataError, StorageError."""
        entry = self._shards[number]
        kinds: dict[str, tuple[str, ...]] = {"tokens": ("u2", "u4"), "mask": ("u1",), "offsets": ("i8",)}
        groups: dict[str, tuple[str, ...]] = {"sequence_lengths": ("u4",), "sequence_offsets": ("i8",)}
        arrays = self._arrays(entry.file, kinds, optional=groups)
        if any((name in arrays) != entry.grouped for name in groups):
            raise self._damaged(entry.file, "the index says otherwise whether its samples are groups")
        lengths = self.lengths[self._starts[number] : self._starts[number + 1]]
        tokens = len(arrays["tokens"])
        fits = tokens == entry.tokens and 8 * len(arrays["mask"]) >= tokens
        if not fits or not _cuts(arrays["offsets"], tokens) or not np.array_equal(np.diff(arrays["offsets"]), lengths):
            raise self._damaged(entry.file, f"it does not match {self.index.lengths.file}")
        if entry.grouped:
            sequences, cuts = arrays["sequence_lengths"], arrays["sequence_offsets"]
            if len(cuts) != len(lengths) + 1 or not _cuts(cuts, len(sequences)) or not (sequences > 0).all():
                raise self._damaged(entry.file, "its sequences do not fill its samples")
            if not np.array_equal(np.add.reduceat(sequences, cuts[:-1], dtype=np.int64), lengths):
                raise self._damaged(entry.file, "its sequences do not fill its samples")
        return arrays

    def _arrays(
        self, file: str, kinds: dict[str, tuple[str, ...]], *, optional: dict[str, tuple[str, ...]] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Arrays of these types, by name."""
        optional = optional or {}
        arrays = map_arrays(self._files.path(file), list(kinds), optional=list(optional))
        for name, array in arrays.items():
            if array.dtype.str[1:] not in (kinds | optional)[name]:
                raise self._damaged(file, f"its array {name} is of type {array.dtype}")
        return arrays

    def _damaged(self, file: str, how: str) -> DataError:
        return DataError(f"{self.name}/{file}: damaged ({how}). Delete the set and prepare it again.")


class JoinedStore:
    """Several sets as one: sample ids are numbered consecutively across them."""

    def __init__(self, stores: Sequence[SampleStore]) -> None:
        self.stores = list(stores)
        self.starts = np.zeros(len(self.stores) + 1, np.int64)
        np.cumsum([len(store) for store in stores], out=self.starts[1:])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        return " ".join(store.fingerprint for store in self.stores)

    def lengths_of(self, ids: Int64Array) -> Int64Array:
        found = np.zeros(len(ids), np.int64)
        for number, mine in self._by_store(ids):
            found[mine] = self.stores[number].lengths_of(ids[mine] - self.starts[number])
        return found

    def labelled_of(self, ids: Int64Array) -> Int64Array:
        found = np.zeros(len(ids), np.int64)
        for number, mine in self._by_store(ids):
            found[mine] = self.stores[number].labelled_of(ids[mine] - self.starts[number])
        return found

    def gather(self, ids: Int64Array) -> tuple[Int64Array, BoolArray, Int64Array]:
        store_of = np.searchsorted(self.starts, ids, side="right") - 1
        return gather_parts(
            store_of,
            self.lengths_of(ids),
            lambda number, mine: self.stores[number].gather(ids[mine] - self.starts[number])[:2],
        )

    def sequences_of(self, ids: Int64Array) -> tuple[Int64Array, Int64Array] | None:
        found = {
            number: self.stores[number].sequences_of(ids[mine] - self.starts[number])
            for number, mine in self._by_store(ids)
        }
        if all(one is None for one in found.values()):
            return None
        store_of = np.searchsorted(self.starts, ids, side="right") - 1
        return join_sequences(store_of, self.lengths_of(ids), lambda number, mine: found[number])

    def sample(self, index: int) -> tuple[Int64Array, BoolArray]:
        """(tokens int64, mask bool) of one sample."""
        tokens, mask, _ = self.gather(np.array([index], np.int64))
        return tokens, mask

    def expect(self, ids: Int64Array) -> None:
        for number, mine in self._by_store(ids):
            self.stores[number].expect(ids[mine] - self.starts[number])

    def close(self) -> None:
        for store in self.stores:
            store.close()

    def _by_store(self, ids: Int64Array) -> list[tuple[int, Int64Array]]:
        """(store, positions in `ids` that belong to it) of every store that `ids` refer to."""
        store_of = np.searchsorted(self.starts, ids, side="right") - 1
        return [(number, np.flatnonzero(store_of == number)) for number in np.unique(store_of).tolist()]


def end_to_end(starts: Int64Array, lengths: Int64Array) -> Int64Array:
    """Concatenated ranges starts[i] .. starts[i] + lengths[i] - 1, int64 (sum of lengths,)."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def gather_parts(
    part_of: Int64Array, lengths: Int64Array, gather: Callable[[int, Int64Array], tuple[Int64Array, BoolArray]]
) -> tuple[Int64Array, BoolArray, Int64Array]:
    """Samples stored in several parts, in the requested order; `gather(part, positions of its samples)` reads one."""
    parts = np.unique(part_of).tolist()
    if len(parts) == 1:
        return (*gather(parts[0], np.arange(len(lengths))), lengths)
    starts = np.cumsum(lengths) - lengths
    tokens, mask = np.empty(int(lengths.sum()), np.int64), np.empty(int(lengths.sum()), np.bool_)
    for part in parts:
        mine = np.flatnonzero(part_of == part)
        into = end_to_end(starts[mine], lengths[mine])
        tokens[into], mask[into] = gather(part, mine)
    return tokens, mask, lengths


def join_sequences(
    part_of: Int64Array, lengths: Int64Array, read: Callable[[int, Int64Array], tuple[Int64Array, Int64Array] | None]
) -> tuple[Int64Array, Int64Array]:
    """`sequences_of` for samples stored in several parts; `read(part, places)` reads one, None: one sequence each."""
    found = []
    counts = np.ones(len(lengths), np.int64)
    for part in np.unique(part_of).tolist():
        mine = np.flatnonzero(part_of == part)
        part_lengths, counts[mine] = read(part, mine) or (lengths[mine], 1)
        found.append((mine, part_lengths))
    starts = np.cumsum(counts) - counts
    joined = np.empty(int(counts.sum()), np.int64)
    for mine, part_lengths in found:
        joined[end_to_end(starts[mine], counts[mine])] = part_lengths
    return joined, counts


def _cuts(offsets: Int64Array, end: int) -> bool:
    """Whether offsets rise from 0 to `end`, without a step of 0."""
    return len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == end and bool((np.diff(offsets) > 0).all())
