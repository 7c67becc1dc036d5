"""Write a token set shard by shard, into a folder or an object store; it can be interrupted at any instant.

Each finished shard has a part file with facts about its samples (lengths, targets, sketches), and `progress.json`
records how far into the input the finished shards reach; each file is complete under its name before the next is
written. A new writer resumes after the last finished shard. Shards end where chunks end, so interruptions do not change
the files. `commit` joins the parts into the sidecars and writes `index.json` last: a set without it is unfinished.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ft_dist.data.encode.chunk import EncodedChunk, SourceCounts
from ft_dist.data.encode.minhash import BUCKETS, KEYS
from ft_dist.data.store.store import INDEX, LENGTHS, VERSION, checksum_of, map_safetensors
from ft_dist.errors import DataError
from ft_dist.storage import Storage

SHARD_TOKENS = 2**24
"""A shard of this many tokens is 34 or 67 MB: few files, small enough to hold in memory and fetch whole"""

SKETCHES = "sketches.safetensors"
REPORT = "report.json"
PROGRESS = "progress.json"
_PARTS: dict[str, tuple[str, Any, tuple[int, ...]]] = {
    "lengths": ("U32", np.uint32, ()),
    "labelled": ("U32", np.uint32, ()),
    "keys": ("U64", np.uint64, (KEYS,)),
    "signatures": ("U32", np.uint32, (BUCKETS,)),
}


class ShardWriter:
    """Appends chunks to a set; at most one shard is held in memory.

    `records` is the number of input records in finished shards: the caller resumes there.
    """

    def __init__(self, storage: Storage, *, fingerprint: str, made_with: dict[str, Any], dtype: Any) -> None:
        """Resumes an unfinished set of the same fingerprint. Raises DataError if it finds a different one."""
        self.storage = storage
        self.fingerprint = fingerprint
        self.made_with = made_with
        self._dtype = dtype
        self.counts = SourceCounts()
        self._shards: list[dict[str, Any]] = []
        self._parts: list[dict[str, int]] = []
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
        with tempfile.TemporaryDirectory(prefix="ft_dist-") as folder:
            for number in range(len(self._parts)):
                flat = map_safetensors(self._local(_part_name(number), Path(folder)), [name])[name]
                yield flat.reshape(-1, *_PARTS[name][2])

    def first_samples(self, count: int) -> list[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]:
        """(tokens, mask) of `count` samples spread over the first shard."""
        with tempfile.TemporaryDirectory(prefix="ft_dist-") as folder:
            path = self._local(self._shards[0]["file"], Path(folder))
            shard = map_safetensors(path, ["tokens", "mask", "offsets"])
            mask = np.unpackbits(shard["mask"], count=len(shard["tokens"])).astype(np.bool_)
            last = len(shard["offsets"]) - 2
            chosen = dict.fromkeys(last * number // max(1, count - 1) for number in range(count))
            ranges = [slice(*shard["offsets"][number : number + 2].tolist()) for number in chosen]
            return [(shard["tokens"][one].copy(), mask[one]) for one in ranges]

    def commit(self, report: dict[str, Any]) -> None:
        """Write the sidecars and report, then the index, and delete the files that only an unfinished set needs."""
        with tempfile.TemporaryDirectory(prefix="ft_dist-") as folder:
            lengths = self._write_joined(LENGTHS, ["lengths", "labelled"], Path(folder))
            sketches = self._write_joined(SKETCHES, ["keys", "signatures"], Path(folder))
        self.storage.write(REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode())
        index = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "made_with": self.made_with,
            "samples": self.counts.samples,
            "tokens": self.counts.tokens,
            "labelled_tokens": self.counts.labelled_tokens,
            "lengths": lengths,
            "sketches": sketches,
            "shards": self._shards,
            "counts": asdict(self.counts),
        }
        self.storage.write(INDEX, json.dumps(index, indent=1).encode())
        self.storage.delete(PROGRESS)
        for number in range(len(self._parts)):
            self.storage.delete(_part_name(number))

    def _resume(self) -> None:
        if not self.storage.exists(PROGRESS):
            return
        place = self.storage.url
        try:
            progress = json.loads(self.storage.read_bytes(PROGRESS))
            fingerprint, version = progress["fingerprint"], progress["version"]
            counts, shards, parts = SourceCounts(**progress["counts"]), progress["shards"], progress["parts"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{place}/{PROGRESS}: damaged ({error}). Delete the unfinished set.") from None
        if (fingerprint, version) != (self.fingerprint, VERSION):
            raise DataError(
                f"{place}: holds an unfinished set of other data, another tokenizer or other options. "
                "Delete it, or write to another place."
            )
        sizes = {shard["file"]: shard["bytes"] for shard in shards}
        sizes |= {_part_name(number): part["bytes"] for number, part in enumerate(parts)}
        if all(self.storage.exists(name) and self.storage.size(name) == size for name, size in sizes.items()):
            self.counts, self._shards, self._parts = counts, shards, parts

    def _flush(self) -> None:
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
        self._shards.append(
            {
                **self._write(f"tokens-{number:05d}.safetensors", {**shard, **groups}),
                "samples": len(lengths),
                "tokens": int(lengths.sum()),
                **({"grouped": True} if groups else {}),
            }
        )
        entry = self._write(_part_name(number), part)
        self._parts.append({"bytes": entry["bytes"], **{name: len(array) for name, array in part.items()}})
        progress = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "counts": asdict(self.counts),
            "shards": self._shards,
            "parts": self._parts,
        }
        self._pending, self._sequences, self._pending_tokens = [], [], 0
        self.storage.write(PROGRESS, json.dumps(progress, indent=1).encode())

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

    def _write(self, name: str, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
        from safetensors.numpy import save

        content = save(arrays)
        self.storage.write(name, content)
        checksum = hashlib.blake2b(content, digest_size=16).hexdigest()
        return {"file": name, "bytes": len(content), "checksum": checksum}

    def _local(self, name: str, scratch: Path) -> Path:
        if self.storage.local is not None:
            return self.storage.local / name
        path = scratch / "fetched"
        path.unlink(missing_ok=True)
        self.storage.fetch(name, path)
        return path

    def _write_joined(self, file: str, names: Sequence[str], scratch: Path) -> dict[str, Any]:
        """A safetensors file of whole arrays, streamed from the parts: memory holds one part."""
        header: dict[str, Any] = {}
        at = 0
        for name in names:
            code, dtype, shape = _PARTS[name]
            rows = sum(part[name] for part in self._parts)
            end = at + rows * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            header[name] = {"dtype": code, "shape": [rows, *shape], "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = scratch / file
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for array in self.parts(name):
                    stream.write(array.tobytes())
        self.storage.write(file, path)
        return {"file": file, "bytes": path.stat().st_size, "checksum": checksum_of(path)}


def _part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"
