"""MDS folders and Megatron sets are read as their own libraries wrote them.

The folders in `mds/` were written by mosaicml-streaming 0.13.0 (MDSWriter, size_limit=700 for the first three). The
Megatron writer below follows megatron/core/datasets/indexed_dataset.py.
"""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from ft_dist.config.schema import DataConfig, SourceConfig
from ft_dist.data.prepare.build import prepare
from ft_dist.data.read.sources import read_records
from ft_dist.errors import DataError

MDS = Path(__file__).parent / "mds"
ROWS = [{"prompt": f"question {n} é", "completion": "answer " * (n % 5 + 1), "n": n} for n in range(24)]


def records(path: Path):
    return list(read_records(SourceConfig(path=str(path))))


@pytest.mark.parametrize("kind", ["plain", "gz", "zstd"])
def test_mds_with_and_without_compression(kind):
    found = records(MDS / kind)
    assert [record.fields for record in found] == ROWS
    assert found[-1].where.startswith(str(MDS / kind / "shard.00002.mds sample "))


@pytest.mark.parametrize("name", ["tokens", "tokens_free"])
def test_mds_of_tokens_and_of_messages(name):
    assert [r.fields["tokens"].tolist() for r in records(MDS / name)] == [list(range(n, 3 * n + 4)) for n in range(5)]
    turns = [[message["content"] for message in record.fields["messages"]] for record in records(MDS / "messages")]
    assert turns == [[f"hi {n}", "hello"] for n in range(5)]


@pytest.mark.parametrize(
    "damage, message",
    [
        ("cut", r"shard\.00001\.mds: \d+ bytes instead of 655"),
        ("gone", r"shard\.00001\.mds: listed in index\.json, but missing"),
        ("size", r"shard\.00001\.mds sample 1: its columns take \d+ bytes of \d+"),
        ("packed", r"shard\.00001\.mds\.gz: damaged gz data"),
    ],
)
def test_damaged_mds_is_named(tmp_path, damage, message):
    folder = tmp_path / "set"
    shutil.copytree(MDS / ("gz" if damage == "packed" else "plain"), folder)
    shard = next(folder.glob("shard.00001*"))
    content = bytearray(shard.read_bytes())
    if damage == "gone":
        shard.unlink()
    else:
        if damage == "size":
            first = struct.unpack_from("<I", content, 4)[0]
            struct.pack_into("<I", content, first, 3)
        shard.write_bytes(content[:-20] if damage in ("cut", "packed") else content)
    with pytest.raises(DataError, match=message):
        records(folder)


def write_megatron(path: Path, documents: list[list[list[int]]], dtype: type, code: int) -> None:
    """Documents of sequences of tokens."""
    sequences = [sequence for document in documents for sequence in document]
    content = [np.array(sequence, dtype).tobytes() for sequence in sequences]
    path.with_suffix(".bin").write_bytes(b"".join(content))
    offsets = np.cumsum([0, *(len(part) for part in content)])[:-1]
    boundaries = np.cumsum([0, *(len(document) for document in documents)])
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(boundaries))
        + np.array([len(sequence) for sequence in sequences], np.int32).tobytes()
        + offsets.astype(np.int64).tobytes()
        + boundaries.astype(np.int64).tobytes()
    )


@pytest.mark.parametrize("dtype, code", [(np.uint16, 8), (np.int32, 4)])
@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_megatron_documents(tmp_path, dtype, code, suffix):
    write_megatron(tmp_path / "text", [[[1, 2, 3], [4]], [], [[5, 6]]], dtype, code)
    found = records((tmp_path / "text").with_suffix(suffix))
    assert [record.fields["tokens"].tolist() for record in found] == [[1, 2, 3, 4], [5, 6]]
    assert found[1].where == f"{tmp_path / 'text.bin'} document 3"
    assert len(records(tmp_path)) == 2


def test_damaged_megatron_is_named(tmp_path):
    write_megatron(tmp_path / "text", [[[1, 2, 3]], [[4]]], np.uint16, 8)
    tokens = tmp_path / "text.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"text\.bin: 7 bytes, but its index needs 8"):
        records(tokens)
    tokens.unlink()
    with pytest.raises(DataError, match=r"text\.bin: missing"):
        records(tmp_path / "text.idx")
    (tmp_path / "text.bin").touch()
    (tmp_path / "text.idx").write_bytes(b"PK" + b"\x00" * 50)
    with pytest.raises(DataError, match=r"text\.idx: not a Megatron index"):
        records(tmp_path / "text.idx")


def test_tokens_enter_the_store_unchanged(tmp_path, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    write_megatron(tmp_path / "text", [[list(range(100))], [[7, 8, 9]]], np.int32, 4)

    def run(path: Path, name: str):
        data = DataConfig.model_validate({"train": [str(path)], "cache_dir": str(tmp_path / name), "max_length": 64})
        return prepare(data.train, tokenizer, data=data, model_path="tiny")

    store = run(tmp_path / "text.idx", "a").store
    samples = [store.sample(number)[0].tolist() for number in range(len(store))]
    assert samples == [list(range(64)), list(range(63, 100)), [7, 8, 9]]
    assert int(store.labelled_of(np.arange(3)).sum()) == 99 + 2
    write_megatron(tmp_path / "other", [[[1, 2, 100_000]]], np.int32, 4)
    with pytest.raises(DataError, match=r"other\.bin document 1: token 100000, but the tokenizer has only \d+ tokens"):
        run(tmp_path / "other.idx", "b")
    assert run(MDS / "tokens", "c").counts[0].samples == 5
