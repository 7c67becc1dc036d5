"""Write a token set shard by shard, into a folder or an object store; it can be interrupted at any instant.

Each finished shard has a part file with facts about its samples (lengths, targets, sketches), and `progress.json`
records how far into the input the finished shards reach; each file is complete under its name before the next is
written. A new writer resumes after the last finished shard. Shards end where chunks end, so interruptions do not change
the files. `commit` joins the parts into the sidecars and writes `index.json` last: a set without it is unfinished.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ft_dist.data.encode.chunk import EncodedChunk, SourceCounts
from ft_dist.data.encode.minhash import BUCKETS, KEYS
from ft_dist.data.read.paths import LENGTHS
from ft_dist.data.store.arrays import map_arrays
from ft_dist.data.store.index import INDEX, REPORT, VERSION, FileEntry, ShardEntry, check_seal, checksum_of, sealed
from ft_dist.errors import DataError, MissingFileError, StorageError
from ft_dist.outside import Document, parse_object, validated
from ft_dist.storage import Storage

SHARD_TOKENS = 2**24
"""A shard of this many tokens is 34 or 67 MB: few files, small enough to hold in memory and fetch whole"""

SKETCHES = "sketches.safetensors"
PROGRESS = "progress.json"
_PARTS: dict[str, tuple[str, Any, tuple[int, ...]]] = {
    "lengths": ("U32", np.uint32, ()),
    "labelled": ("U32", np.uint32, ()),
    "keys": ("U64", np.uint64, (KEYS,)),
    "signatures": ("U32", np.uint32, (BUCKETS,)),
}


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Raises StorageError if no temporary files can be written."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="ft_dist-"))
    except OSError as error:
        raise StorageError(
            f"TMPDIR: no temporary files can be written ({error}). Free space there, or set TMPDIR to another folder."
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Part(Document):
    """Facts about a shard's samples: the bytes and checksum of their file, and the rows of each array."""

    bytes: int
    checksum: str
    lengths: int
    labelled: int
    keys: int
    signatures: int


class _Progress(Document):
    version: int
    fingerprint: str
    counts: SourceCounts
    shards: list[ShardEntry]
    parts: list[_Part]


class ShardWriter:
    """Appends chunks to a set; at most one shard is held in memory.

    `records` is the number of input records in finished shards: the caller resumes there.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        fingerprint: str,
        made_with: dict[str, Any],
        dtype: Any,
        before_shard: Callable[[], None] = lambda: None,
    ) -> None:
        """Resumes an unfinished set of the same fingerprint. Raises DataError if it finds a different one.

        `before_shard` is called before a shard is kept; the shard is lost if it raises.
        """
        self.storage = storage
        self.fingerprint = fingerprint
        self.made_with = made_with
        self._dtype = dtype
        self._before_shard = before_shard
        self.counts = SourceCounts()
        self._shards: list[ShardEntry] = []
        self._parts: list[_Part] = []
        self._resume()
        self._pending: list[EncodedChunk] = []
        self._sequences: list[Sequence[Sequence[int]] | None] = []
        """The groups of each pending chunk"""
        self._pending_tokens = 0

    @property
    def records(self) -> int:
        return self.counts.records - sum(chunk.counts.records for chunk in self._pending)

    def add(self, chunk: EncodedChunk, *, sequences: Sequence[Sequence[int]] | None = None) -> None:
        """`sequences` holds the lengths of each sample's sequences, if samples are groups of several.

        The chunk's `labelled` must not count the first token of any sequence, which no token predicts.
        """
        if sequences is not None:
            assert [sum(lengths) for lengths in sequences] == chunk.lengths.tolist(), "sequences fill their samples"
        self._pending.append(chunk)
        self._sequences.append(sequences)
        self._pending_tokens += len(chunk.tokens)
        self.counts.add(chunk.counts)
        if self._pending_tokens >= SHARD_TOKENS:
            self._flush()

    def flush_rest(self) -> None:
        """Write the rest as the last, shorter shard."""
        if self._pending_tokens:
            self._flush()

    def parts(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """One array per finished shard, in order: lengths, labelled, keys (n, KEYS) or signatures (n, BUCKETS)."""
        with temporary_folder() as folder:
            for number in range(len(self._parts)):
                flat = map_arrays(self._local(_part_name(number), folder), [name])[name]
                yield flat.reshape(-1, *_PARTS[name][2])

    def first_samples(self, count: int) -> list[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]:
        """(tokens, mask) of `count` samples spread over the first shard."""
        with temporary_folder() as folder:
            path = self._local(self._shards[0].file, folder)
            shard = map_arrays(path, ["tokens", "mask", "offsets"])
            mask = np.unpackbits(shard["mask"], count=len(shard["tokens"])).astype(np.bool_)
            last = len(shard["offsets"]) - 2
            chosen = dict.fromkeys(last * number // max(1, count - 1) for number in range(count))
            ranges = [slice(*shard["offsets"][number : number + 2].tolist()) for number in chosen]
            return [(shard["tokens"][one].copy(), mask[one]) for one in ranges]

    def commit(self, report: dict[str, Any]) -> None:
        """Write the sidecars and report, then the index, and delete the files that only an unfinished set needs."""
        with temporary_folder() as folder:
            lengths = self._write_joined(LENGTHS, ["lengths", "labelled"], folder)
            sketches = self._write_joined(SKETCHES, ["keys", "signatures"], folder)
        shown = json.dumps(report, indent=1, ensure_ascii=False).encode()
        self.storage.write(REPORT, shown)
        index = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "made_with": self.made_with,
            "samples": self.counts.samples,
            "tokens": self.counts.tokens,
            "labelled_tokens": self.counts.labelled_tokens,
            "lengths": lengths.model_dump(),
            "sketches": sketches.model_dump(),
            "report": {"file": REPORT, "bytes": len(shown), "checksum": checksum_of(shown)},
            "shards": [_dumped(shard) for shard in self._shards],
            "counts": asdict(self.counts),
        }
        self.storage.write(INDEX, sealed(index))
        self.discard()

    def discard(self) -> None:
        """Delete what an unfinished set needs to be resumed."""
        self.storage.delete(PROGRESS)
        for number in range(len(self._parts)):
            self.storage.delete(_part_name(number))

    def _resume(self) -> None:
        if not self.storage.exists(PROGRESS):
            return
        place = self.storage.url
        where = self.storage.url_of(PROGRESS)
        try:
            tree = parse_object(self.storage.read_bytes(PROGRESS), where=where, error=DataError)
            check_seal(tree, where=where)
        except DataError:
            return  # damaged, so it cannot say how far the finished shards reach
        if (tree.get("fingerprint"), tree.get("version")) != (self.fingerprint, VERSION):
            raise DataError(
                f"{place}: holds an unfinished set of other data, another tokenizer or other options. "
                "Delete it, or write to another place."
            )
        try:
            progress = validated(tree, _Progress, where=where, error=DataError)
        except DataError:  # of an older version, without checksums
            return
        intact = all(self._is_intact(_part_name(number), part) for number, part in enumerate(progress.parts))
        if intact and all(self._is_intact(shard.file, shard) for shard in progress.shards):
            self.counts, self._shards, self._parts = progress.counts, progress.shards, progress.parts

    def _is_intact(self, name: str, entry: FileEntry | _Part) -> bool:
        """Whether a file holds what was written. Of shards in an object store, only the size is compared."""
        try:
            if self.storage.size(name) != entry.bytes:
                return False
            if self.storage.local is None and isinstance(entry, FileEntry):
                return True
            return checksum_of(self.storage.read_bytes(name)) == entry.checksum
        except MissingFileError:
            return False

    def _flush(self) -> None:
        self._before_shard()
        chunks, number = self._pending, len(self._shards)
        lengths = np.concatenate([chunk.lengths for chunk in chunks])
        tokens = np.concatenate([chunk.tokens for chunk in chunks])
        assert tokens.dtype == self._dtype
        shard = {
            "tokens": tokens,
            "mask": np.packbits(np.concatenate([chunk.mask for chunk in chunks])),
            "offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        }
        groups = self._pending_groups()
        part = {name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in _PARTS}
        entry = self._write(f"tokens-{number:05d}.safetensors", {**shard, **groups})
        self._shards.append(
            ShardEntry(**entry.model_dump(), samples=len(lengths), tokens=int(lengths.sum()), grouped=bool(groups))
        )
        entry = self._write(_part_name(number), part)
        rows = {name: len(array) for name, array in part.items()}
        self._parts.append(_Part(bytes=entry.bytes, checksum=entry.checksum, **rows))
        progress = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "counts": asdict(self.counts),
            "shards": [_dumped(shard) for shard in self._shards],
            "parts": [part.model_dump() for part in self._parts],
        }
        self._pending, self._sequences, self._pending_tokens = [], [], 0
        self.storage.write(PROGRESS, sealed(progress))

    def _pending_groups(self) -> dict[str, npt.NDArray[Any]]:
        """Lengths and offsets of the pending sequences; empty if every sample is one sequence."""
        if all(one is None for one in self._sequences):
            return {}
        samples = list[Sequence[int]]()
        for chunk, sequences in zip(self._pending, self._sequences, strict=True):
            samples += [[length] for length in chunk.lengths.tolist()] if sequences is None else sequences
        counts = np.array([len(lengths) for lengths in samples], np.int64)
        return {
            "sequence_lengths": np.concatenate([np.asarray(lengths, np.uint32) for lengths in samples]),
            "sequence_offsets": np.concatenate([[0], np.cumsum(counts)]),
        }

    def _write(self, name: str, arrays: dict[str, npt.NDArray[Any]]) -> FileEntry:
        from safetensors.numpy import save

        content = save(arrays)
        self.storage.write(name, content)
        return FileEntry(file=name, bytes=len(content), checksum=checksum_of(content))

    def _local(self, name: str, scratch: Path) -> Path:
        if self.storage.local is not None:
            return self.storage.local / name
        path = scratch / "fetched"
        path.unlink(missing_ok=True)
        self.storage.fetch(name, path)
        return path

    def _write_joined(self, file: str, names: Sequence[str], scratch: Path) -> FileEntry:
        """A safetensors file of whole arrays, streamed from the parts: memory holds one part."""
        header: dict[str, Any] = {}
        at = 0
        for name in names:
            code, dtype, shape = _PARTS[name]
            rows = sum(getattr(part, name) for part in self._parts)
            end = at + rows * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            header[name] = {"dtype": code, "shape": [rows, *shape], "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path, digest = scratch / file, hashlib.blake2b(digest_size=16)
        arrays = (array.tobytes() for name in names for array in self.parts(name))
        with path.open("wb") as stream:
            for block in chain([len(text).to_bytes(8, "little") + text], arrays):
                stream.write(block)
                digest.update(block)
        self.storage.write(file, path)
        return FileEntry(file=file, bytes=path.stat().st_size, checksum=digest.hexdigest())


def _part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _dumped(shard: ShardEntry) -> dict[str, Any]:
    return shard.model_dump(exclude_defaults=True)  # `grouped` is written for shards that have groups
