"""Sets are mapped lazily and gathered in any order, and damage is named."""

import json
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from ft_dist.data.store.store import OPEN_SHARDS, JoinedStore, TokenStore
from ft_dist.errors import DataError

some = settings(max_examples=40, deadline=None)


def write_set(folder: Path, samples, *, shard_tokens: int) -> TokenStore:
    """A set written to the format's specification, without our writer."""
    folder.mkdir()
    shards, pending = [], []

    def write(name: str, arrays: dict) -> dict:
        content = save(arrays)
        (folder / name).write_bytes(content)
        return {"file": name, "bytes": len(content), "checksum": blake2b(content, digest_size=16).hexdigest()}

    def flush() -> None:
        lengths = [len(tokens) for tokens, _ in pending]
        arrays = {
            "tokens": np.concatenate([np.array(tokens, np.uint16) for tokens, _ in pending]),
            "mask": np.packbits(np.concatenate([np.array(mask, bool) for _, mask in pending])),
            "offsets": np.cumsum([0, *lengths]),
        }
        entry = write(f"tokens-{len(shards):05d}.safetensors", arrays)
        shards.append({**entry, "samples": len(pending), "tokens": sum(lengths)})
        pending.clear()

    samples = list(samples)
    for sample in samples:
        pending.append(sample)
        if sum(len(tokens) for tokens, _ in pending) >= shard_tokens:
            flush()
    if pending:
        flush()
    arrays = {
        "lengths": np.array([len(tokens) for tokens, _ in samples], np.uint32),
        "labelled": np.array([sum(mask[1:]) for _, mask in samples], np.uint32),
    }
    files = {name: write(f"{name}.safetensors", arrays) for name in ("lengths", "sketches")}
    index = {"version": 2, "fingerprint": folder.name, **files, "shards": shards}
    (folder / "index.json").write_text(json.dumps(index))
    return TokenStore.open(folder)


def random_samples(count: int, seed: int):
    generator = np.random.default_rng(seed)
    for length in generator.integers(2, 40, count).tolist():
        yield generator.integers(0, 1000, length).tolist(), generator.integers(0, 2, length).astype(bool).tolist()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    samples = [list(random_samples(count, seed)) for seed, count in enumerate((300, 7, 90))]
    folder = tmp_path_factory.mktemp("sets")
    stores = [write_set(folder / f"s{number}", some, shard_tokens=200) for number, some in enumerate(samples)]
    return stores, samples


@given(st.lists(st.integers(0, 396), max_size=60))
@some
def test_gather_returns_the_requested_samples_in_order(sets, ids):
    stores, samples = sets
    joined, flat = JoinedStore(stores), [one for some in samples for one in some]
    tokens, mask, lengths = joined.gather(np.array(ids, np.int64))
    assert tokens.tolist() == [token for index in ids for token in flat[index][0]]
    assert mask.tolist() == [bit for index in ids for bit in flat[index][1]]
    assert lengths.tolist() == [len(flat[index][0]) for index in ids]
    assert joined.lengths_of(np.array(ids, np.int64)).tolist() == lengths.tolist()
    targets = [sum(flat[index][1][1:]) for index in ids]
    assert joined.labelled_of(np.array(ids, np.int64)).tolist() == targets


def test_few_shards_are_open_at_a_time(tmp_path):
    store = write_set(tmp_path / "many", random_samples(600, 0), shard_tokens=1)
    assert len(store.index.shards) == 600
    store.gather(np.arange(600))
    mapped = Path("/proc/self/maps").read_text().count("many/tokens-")
    assert 0 < mapped <= OPEN_SHARDS


def test_a_hint_names_each_shard_once_in_the_order_of_use(tmp_path, monkeypatch):
    store = write_set(tmp_path / "set", [([1, 2, 3], [True] * 3)] * 8, shard_tokens=6)
    asked = []
    monkeypatch.setattr(store._files, "expect", asked.append)
    store.expect(np.array([7, 0, 6, 1, 3]))
    assert asked == [["tokens-00003.safetensors", "tokens-00000.safetensors", "tokens-00001.safetensors"]]


def test_shards_of_another_set_are_named(tmp_path):
    first = write_set(tmp_path / "a", [([1, 2, 3], [True] * 3)] * 4, shard_tokens=6)
    write_set(tmp_path / "b", [([1, 2], [True] * 2), ([1] * 4, [True] * 4)] * 2, shard_tokens=6)
    shard = "tokens-00001.safetensors"
    (tmp_path / "a" / shard).write_bytes((tmp_path / "b" / shard).read_bytes())
    with pytest.raises(DataError, match=r"tokens-00001\.safetensors: damaged \(its checksum is"):
        first.gather(np.array([3]))


def test_a_set_of_the_first_version_is_refused(tmp_path):
    write_set(tmp_path / "a", [([1, 2, 3], [True] * 3)], shard_tokens=6)
    index = tmp_path / "a" / "index.json"
    index.write_text(index.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(DataError, match="has version 1, not 2"):
        TokenStore.open(tmp_path / "a")


@pytest.mark.parametrize(
    "name", ["/tmp/stolen", "../stolen.safetensors", "a/b.safetensors", ".x.safetensors", "index.json"]
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path, name):
    write_set(tmp_path / "a", [([1, 2, 3], [True] * 3)], shard_tokens=6)
    index = tmp_path / "a" / "index.json"
    index.write_text(index.read_text().replace("tokens-00000.safetensors", name))
    with pytest.raises(DataError, match=r"index\.json: names the file"):
        TokenStore.open(tmp_path / "a")


def test_a_header_of_a_terabyte_is_refused(tmp_path):
    write_set(tmp_path / "a", [([1, 2, 3], [True] * 3)], shard_tokens=6)
    shard = tmp_path / "a" / "tokens-00000.safetensors"
    content = (2**40).to_bytes(8, "little") + shard.read_bytes()[8:]
    shard.write_bytes(content)
    index, checksum = tmp_path / "a" / "index.json", blake2b(content, digest_size=16).hexdigest()
    tree = json.loads(index.read_text())
    tree["shards"][0]["checksum"] = checksum
    index.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"its header says that it has 1099511627776 bytes"):
        TokenStore.open(tmp_path / "a").gather(np.arange(1))
