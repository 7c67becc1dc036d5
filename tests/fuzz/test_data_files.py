"""Data files after any damage: each gives samples, or one DataError. Read and encoded as `check` does it."""

import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 - takes long to import, which is no fault of the first file
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ft_dist.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig
from ft_dist.data.prepare.preview import preview_data
from ft_dist.data.read.check import check_sources
from ft_dist.errors import DataError, UserError
from tests.data.conftest import build_tokenizer
from tests.data.read.test_binary_sets import MDS, write_megatron
from tests.fuzz.bounds import outcome
from tests.fuzz.conftest import EXAMPLES
from tests.fuzz.mutations import altered, damaged

CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Say {n} é"},
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}] if n else "no"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}] if n == 2 else None,
    }
    for n in range(4)
]
ALPACA = [{"instruction": f"Say {n}", "input": "now", "output": "yes"} for n in range(4)]
"""Flat, for tables"""
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
RECORDS: list[dict[str, Any]] = [
    *CHATS,
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    {"prompt": "a", "completion": "b", "system": "c"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    *ALPACA[:1],
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[]"},
    {"text": "some words"},
    {"tokens": [1, 2, 3]},
]
"""One of each format"""


def lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def tables() -> dict[str, bytes]:
    table = pyarrow.Table.from_pylist(ALPACA)
    parquet, arrow = io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    with pyarrow.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    return {"a.parquet": parquet.getvalue(), "a.arrow": arrow.getvalue()}


def texts() -> dict[str, bytes]:
    rows = "".join(f'"Say {n}",now,"yes, {n}"\n' for n in range(4))
    found = {
        "a.jsonl": lines(CHATS),
        "a.json": json.dumps(CHATS, indent=1).encode(),
        "a.csv": f"instruction,input,output\n{rows}".encode(),
        "a.tsv": b"prompt\tcompletion\na\tb\nc\td\n",
        "a.txt": "One text.\n\nAnother é\nof two lines.\n".encode(),
    }
    packed = {f"{name}.gz": gzip.compress(content) for name, content in found.items()}
    packed |= {f"{name}.zst": zstandard.compress(content) for name, content in found.items()}
    return found | packed


TEXTS, TABLES = texts(), tables()
TOKENIZER = build_tokenizer("chatml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def read(path: Path | str, **source: Any) -> list[str]:
    """What `check` says about a source: the quick look, then the first records as encoded."""
    data = DataConfig.model_validate({"train": [{"path": str(path), **source}], "max_length": 128})
    config = RunConfig.model_construct(data=data, model=ModelConfig.model_construct(path="tiny"))
    return [*check_sources(data), *(str(one.counts) for one in preview_data(config, TOKENIZER))]


def tried(file: Path, content: bytes) -> list[str] | UserError:
    file.write_bytes(content)
    found = outcome(lambda: read(file))
    if isinstance(found, DataError):
        assert file.name in str(found), found
    return found


@pytest.mark.parametrize("name", [*TEXTS, *TABLES])
def test_undamaged_files_are_accepted(folder: Path, name: str) -> None:
    assert isinstance(tried(folder / name, (TEXTS | TABLES)[name]), list)


@given(st.data())
def test_damaged_text_files(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TEXTS)))
    content = data.draw(st.binary(max_size=200) if data.draw(st.integers(0, 9)) == 0 else damaged(TEXTS[name]))
    tried(folder / name, content)


@given(st.data())
def test_records_of_any_shape(folder: Path, data: st.DataObject) -> None:
    """Well-formed JSON whose values are missing, of another type, or absurd."""
    record = data.draw(st.sampled_from(RECORDS))
    other = data.draw(altered(record))
    text = json.dumps([other, record] if data.draw(st.booleans()) else other, default=str)
    tried(folder / "a.json", text.encode())


@settings(max_examples=max(10, EXAMPLES // 10))  # `datasets` takes a tenth of a second per file
@given(st.data())
def test_damaged_tables(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TABLES)))
    tried(folder / name, data.draw(damaged(TABLES[name])))


@pytest.fixture(scope="module")
def mds(folder: Path) -> Path:
    return Path(shutil.copytree(MDS, folder / "mds"))


@given(st.data())
def test_damaged_mds_folders(mds: Path, data: st.DataObject) -> None:
    kind = mds / data.draw(st.sampled_from(["plain", "gz", "zstd", "tokens_free", "messages"]))
    file = data.draw(st.sampled_from(sorted(kind.iterdir())))
    original = file.read_bytes()
    if file.name == "index.json" and data.draw(st.booleans()):
        content = json.dumps(data.draw(altered(json.loads(original)))).encode()
    else:
        content = data.draw(damaged(original))
    file.write_bytes(content)
    try:
        outcome(lambda: read(kind))
    finally:
        file.write_bytes(original)


@given(st.data())
def test_damaged_megatron_files(folder: Path, data: st.DataObject) -> None:
    write_megatron(folder / "b", [[[1, 2, 3], [4]], [], [[5, 6]]], np.uint16, 8)
    file = folder / data.draw(st.sampled_from(["b.idx", "b.bin"]))
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    outcome(lambda: read(folder / "b.idx"))


@given(st.text(max_size=300) | st.sampled_from(["/", "~", "~nobody-here/x", ".", "..", "//", "/etc/shadow", "/proc"]))
def test_paths_of_any_text(path: str) -> None:
    assume("://" not in path)
    assume(not path.startswith(("/", "~", ".")) or len(path) < 20)
    outcome(lambda: check_sources(DataConfig.model_construct(train=[source(path)], eval=[])))


def source(path: str) -> SourceConfig:
    return SourceConfig.model_construct(path=path, weight=1.0, format="auto", columns={}, split="train", name=None)
