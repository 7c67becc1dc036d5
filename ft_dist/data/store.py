"""Tokenised samples on disk, memory-mapped: safetensors shards and an `index.json`.

A shard holds `tokens` (uint16 or uint32, the samples end to end), `mask` (one bit a token, set where it is learnt,
`numpy.packbits` order), `offsets` (int64, samples + 1) and `labelled` (int32, targets of a sample after the shift). The
index names the shards with their bytes, samples, tokens and BLAKE2b checksums. A set appears under its name only when
all of it is on disk (written beside, synced, renamed), so whatever is found under the name is whole or damaged later;
`open` sees a wrong size, `verify` a wrong byte.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ft_dist.errors import DataError

VERSION = 1
SHARD_TOKENS = 2**25
INDEX = "index.json"
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I32": np.int32, "I64": np.int64}

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class SampleStore(Protocol):
    """Samples by index: what order, packing and collation need to know."""

    lengths: Int64Array
    """Tokens of each sample"""
    labelled: Int64Array
    """Targets of each sample: learnt tokens that have one before them"""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> tuple[Int64Array, BoolArray]: ...


class TokenStore:
    """One prepared set, opened read-only by memory map."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.index = index
        self._shards = [_map_shard(folder / shard["file"], shard) for shard in index["shards"]]
        counts = [len(shard["labelled"]) for shard in self._shards]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        none = np.zeros(0, np.int64)
        self.lengths: Int64Array = np.concatenate([none, *(np.diff(shard["offsets"]) for shard in self._shards)])
        self.labelled: Int64Array = np.concatenate([none, *(shard["labelled"] for shard in self._shards)])

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        """Map a finished set. Raises DataError where it is missing, of another version, or a shard's size is wrong."""
        folder = Path(folder)
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if index["version"] != VERSION:
                raise DataError(f"{folder}: token set of version {index['version']}, this is {VERSION}. Delete it.")
            return cls(folder, index)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder}: not a whole token set ({error}). Delete the folder and prepare again."
            ) from None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(shard["bytes"] for shard in self.index["shards"])

    @property
    def fingerprint(self) -> str:
        return str(self.index["fingerprint"])

    def sample(self, index: int) -> tuple[Int64Array, BoolArray]:
        """(tokens int64, mask bool) of one sample, copied out of the map."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard, local = self._shards[number], index - int(self._starts[number])
        start, end = int(shard["offsets"][local]), int(shard["offsets"][local + 1])
        first_byte = start // 8
        bits = np.unpackbits(shard["mask"][first_byte : -(-end // 8)])
        mask = bits[start - first_byte * 8 : end - first_byte * 8].astype(np.bool_)
        return shard["tokens"][start:end].astype(np.int64), mask

    def verify(self) -> None:
        """Read every byte. Raises DataError naming a shard whose checksum differs."""
        for shard in self.index["shards"]:
            found = _checksum(self.folder / shard["file"])
            if found != shard["checksum"]:
                raise DataError(f"{self.folder / shard['file']}: damaged (checksum {found}). Delete its folder.")


class JoinedStore:
    """Several sets as one: sample ids count through them in order."""

    def __init__(self, stores: Sequence[SampleStore]) -> None:
        self.stores = list(stores)
        sizes = [len(store) for store in stores]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        none = np.zeros(0, np.int64)
        self.lengths: Int64Array = np.concatenate([none, *(store.lengths for store in stores)])
        self.labelled: Int64Array = np.concatenate([none, *(store.labelled for store in stores)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def sample(self, index: int) -> tuple[Int64Array, BoolArray]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.stores[number].sample(index - int(self.starts[number]))


@dataclass(slots=True)
class _Pending:
    tokens: list[npt.NDArray[Any]]
    masks: list[BoolArray]
    size: int = 0


class StoreWriter:
    """Writes a set beside its name and puts it there in one rename; at most one shard is held in memory."""

    def __init__(self, folder: Path, *, vocabulary: int, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.samples = self.tokens = self.labelled = 0
        self._dtype = np.uint16 if vocabulary <= 2**16 else np.uint32
        self._building = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        shutil.rmtree(self._building, ignore_errors=True)
        self._building.mkdir(parents=True)
        self._shards: list[dict[str, Any]] = []
        self._pending = _Pending([], [])

    def add(self, tokens: Sequence[int], mask: Sequence[bool]) -> None:
        self._pending.tokens.append(np.asarray(tokens, self._dtype))
        self._pending.masks.append(np.asarray(mask, np.bool_))
        self._pending.size += len(tokens)
        if self._pending.size >= SHARD_TOKENS:
            self._flush()

    def commit(self, report: dict[str, Any]) -> None:
        """Sync everything, then rename into place; a damaged set of the same name is replaced."""
        self._flush()
        index = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "samples": self.samples,
            "tokens": self.tokens,
            "labelled_tokens": self.labelled,
            "shards": self._shards,
            "report": report,
        }
        _write_synced(self._building / INDEX, json.dumps(index, indent=1).encode())
        _sync_folder(self._building)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._building.rename(self.folder)
        _sync_folder(self.folder.parent)

    def abort(self) -> None:
        shutil.rmtree(self._building, ignore_errors=True)

    def _flush(self) -> None:
        from safetensors.numpy import save

        if not self._pending.tokens:
            return
        lengths = np.array([len(tokens) for tokens in self._pending.tokens], np.int64)
        labelled = np.array([np.count_nonzero(mask[1:]) for mask in self._pending.masks], np.int32)
        arrays = {
            "tokens": np.concatenate(self._pending.tokens),
            "mask": np.packbits(np.concatenate(self._pending.masks)),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "labelled": labelled,
        }
        name = f"tokens-{len(self._shards):05d}.safetensors"
        content = save(arrays)
        _write_synced(self._building / name, content)
        self._shards.append(
            {
                "file": name,
                "bytes": len(content),
                "samples": len(lengths),
                "tokens": int(lengths.sum()),
                "checksum": hashlib.blake2b(content, digest_size=16).hexdigest(),
            }
        )
        self.samples += len(lengths)
        self.tokens += int(lengths.sum())
        self.labelled += int(labelled.sum())
        self._pending = _Pending([], [])


def _map_shard(path: Path, entry: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a safetensors file without reading it: an 8-byte length, a JSON header, then the data."""
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes instead of {entry['bytes']}")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    whole = np.memmap(path, np.uint8, mode="r")
    arrays = {}
    for name in ("tokens", "mask", "offsets", "labelled"):
        start, end = header[name]["data_offsets"]
        data = whole[8 + header_bytes + start : 8 + header_bytes + end]
        arrays[name] = data.view(_DTYPES[header[name]["dtype"]])
    if int(arrays["offsets"][-1]) != len(arrays["tokens"]) or len(arrays["labelled"]) != entry["samples"]:
        raise ValueError(f"{path.name} holds other counts than its index says")
    return arrays


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
