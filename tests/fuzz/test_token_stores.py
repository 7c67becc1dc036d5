"""A prepared set after any damage: its samples are the original ones, or there is one DataError."""

import json
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from ft_dist.data.encode.chunk import EncodedChunk, SourceCounts
from ft_dist.data.encode.minhash import BUCKETS, KEYS, RECORD
from ft_dist.data.prepare.found import read_report
from ft_dist.data.prepare.quality import leakage
from ft_dist.data.store import writer as writing
from ft_dist.data.store.cache import open_store
from ft_dist.data.store.index import read_index, sealed
from ft_dist.data.store.store import TokenStore
from ft_dist.data.store.writer import ShardWriter
from ft_dist.errors import UserError
from ft_dist.storage import open_storage
from tests.fuzz.bounds import outcome
from tests.fuzz.mutations import altered, damaged

SAMPLES = 24
REPEATS: dict[str, Any] = {"records": 0, "examples": []}
LENGTHS = {"shortest": 2, "median": 8, "p90": 12, "p99": 12, "longest": 12, "bins": [{"up_to": 16, "samples": SAMPLES}]}
REPORT = {
    "lengths": LENGTHS,
    "duplicates": REPEATS,
    "near_duplicates": REPEATS,
    "contradictions": {"prompts": 0, "examples": [[1, 2]]},
    "shown": [[{"learnt": False, "text": "a"}, {"learnt": True, "text": "b"}]],
}

Sample = tuple[list[int], list[bool]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, one of which holds groups."""
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    generator = np.random.default_rng(0)
    before, writing.SHARD_TOKENS = writing.SHARD_TOKENS, 60
    try:
        writer = ShardWriter(open_storage(folder), fingerprint="a set", made_with={"encoding": 2}, dtype=np.uint16)
        for chunk in range(3):
            lengths = generator.integers(4, 12, SAMPLES // 3).astype(np.uint32)
            sequences = [[2, int(length) - 2] for length in lengths] if chunk == 1 else None
            tokens = int(lengths.sum())
            counts = SourceCounts(
                format="chat", records=len(lengths), samples=len(lengths), tokens=tokens, labelled_tokens=len(lengths)
            )
            keys = generator.integers(0, 2**63, (len(lengths), KEYS)).astype(np.uint64)
            keys[:, RECORD] = np.arange(len(lengths)) + chunk * len(lengths) + 1
            encoded = EncodedChunk(
                tokens=generator.integers(0, 1000, tokens).astype(np.uint16),
                mask=generator.integers(0, 2, tokens).astype(np.bool_),
                lengths=lengths,
                labelled=np.ones(len(lengths), np.uint32),
                keys=keys,
                signatures=generator.integers(0, 2**31, (len(lengths), BUCKETS)).astype(np.uint32),
                counts=counts,
            )
            writer.add(encoded, sequences=sequences)
        writer.flush_rest()
        writer.commit({"counts": json.loads((folder / "progress.json").read_text())["counts"], **REPORT})
    finally:
        writing.SHARD_TOKENS = before
    return folder


@pytest.fixture(scope="module")
def copy(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Damaged and restored by each example."""
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("fuzz") / "copy"))


def read_all(folder: Path) -> list[Any]:
    """All that a run reads of a set."""
    storage = open_storage(folder, wait_s=0.0)
    report = read_report(storage, read_index(storage))
    store = TokenStore.open(storage)
    try:
        ids = np.arange(len(store))
        samples = [part.tolist() for part in store.gather(ids)]
        sequences = store.sequences_of(ids)
        labelled = store.labelled_of(ids).tolist()
        store.verify()
        found = leakage([str(folder)], [str(folder)])
    finally:
        store.close()
    del found["examples"]  # they name the place
    return [*samples, labelled, None if sequences is None else [part.tolist() for part in sequences], report, found]


def read_damaged(folder: Path, file: str, content: bytes, whole: Path) -> Any:
    (folder / file).write_bytes(content)
    try:
        return outcome(lambda: read_all(folder))
    finally:
        (folder / file).write_bytes((whole / file).read_bytes())


@given(st.data())
def test_a_damaged_file_is_named_or_makes_no_difference(whole: Path, copy: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(path.name for path in whole.iterdir())))
    original = (whole / file).read_bytes()
    content = data.draw(damaged(original))
    found = read_damaged(copy, file, content, whole)
    if not isinstance(found, UserError):
        assert found == read_all(whole)
        assert content == original or file == "index.json", f"{file} was accepted"


@given(st.data())
def test_a_single_flipped_byte_is_always_found(whole: Path, copy: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(path.name for path in whole.glob("*.safetensors"))))
    content = bytearray((whole / file).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    assert isinstance(read_damaged(copy, file, bytes(content), whole), UserError)


@given(st.data())
def test_an_index_of_somebody_else_never_leaves_its_folder(whole: Path, copy: Path, data: st.DataObject) -> None:
    """The checksum of the index itself is right; its values are not."""
    tree = json.loads((whole / "index.json").read_text())
    del tree["checksum"]
    tree = data.draw(altered(tree))
    found = read_damaged(copy, "index.json", sealed(tree), whole)
    if not isinstance(found, UserError):
        assert found == read_all(whole)


@given(st.data())
def test_a_file_of_somebody_else_is_read_within_its_bounds(whole: Path, copy: Path, data: st.DataObject) -> None:
    """All checksums are right; headers, offsets and lengths are not."""
    tree = json.loads((whole / "index.json").read_text())
    del tree["checksum"]
    number = data.draw(st.integers(-2, len(tree["shards"]) - 1))
    entry = tree["shards"][number] if number >= 0 else tree["lengths" if number == -1 else "sketches"]
    original = (whole / entry["file"]).read_bytes()
    size = int.from_bytes(original[:8], "little")
    header, rest = json.loads(original[8 : 8 + size]), original[8 + size :]
    kind = data.draw(st.sampled_from(["header", "size", "bytes", "arrays"]))
    if kind == "header":
        text = json.dumps(data.draw(altered(header))).encode()
        content = len(text).to_bytes(8, "little") + text + rest
    elif kind == "size":
        wrong = data.draw(st.sampled_from([0, 1, size - 1, size + 1, 2**40, 2**63, 2**64 - 1]))
        content = wrong.to_bytes(8, "little") + original[8:]
    elif kind == "bytes":
        content = data.draw(damaged(original))
    else:
        types = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64, "U64": np.uint64}
        arrays = {}
        for name, array in header.items():
            start, end = array["data_offsets"]
            values = np.frombuffer(rest[start:end], types[array["dtype"]]).copy()
            at = data.draw(st.integers(0, len(values) - 1))
            values[at] = data.draw(st.integers(0, min(2**62, int(np.iinfo(values.dtype).max))))
            arrays[name] = values.reshape(array["shape"])
        content = save(arrays)
    entry |= {"bytes": len(content), "checksum": blake2b(content, digest_size=16).hexdigest()}
    (copy / "index.json").write_bytes(sealed(tree))
    try:
        read_damaged(copy, entry["file"], content, whole)
    finally:
        (copy / "index.json").write_bytes((whole / "index.json").read_bytes())


@given(st.data())
def test_a_damaged_progress_file_starts_again_or_resumes_rightly(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("progress")
    try:
        tree = {"version": 2, "fingerprint": "a set", "counts": {"records": 0}, "shards": [], "parts": []}
        content = sealed(tree) if data.draw(st.booleans()) else json.dumps(data.draw(altered(tree))).encode()
        (folder / "progress.json").write_bytes(data.draw(damaged(content)))
        storage = open_storage(folder, wait_s=0.0)
        outcome(lambda: ShardWriter(storage, fingerprint="a set", made_with={}, dtype=np.uint16))
    finally:
        shutil.rmtree(folder)


def test_the_undamaged_set_is_accepted(whole: Path, tmp_path: Path) -> None:
    assert read_all(whole) == read_all(whole)
    store = open_store(str(whole), cache=tmp_path, cache_bytes=1, wait_s=0.0)
    assert len(store) == SAMPLES
