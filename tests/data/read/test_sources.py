"""Every kind of source gives the same records, and every error names its file and line."""

import gzip
import json
import tracemalloc

import pytest
import zstandard

from ft_dist.config.schema import SourceConfig
from ft_dist.data.read.sources import read_records
from ft_dist.errors import DataError

ROWS = [{"prompt": f"p {n}", "completion": f'c "{n}",\nnext é'} for n in range(5)]


def fields(path, **options) -> list[dict]:
    return [record.fields for record in read_records(SourceConfig(path=str(path), **options))]


def write_rows(folder, kind):
    path = folder / f"rows.{kind}"
    if kind in ("jsonl", "ndjson"):
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode()))
    elif kind == "jsonl.zst":
        path.write_bytes(b"".join(zstandard.compress(f"{json.dumps(row)}\n".encode()) for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif kind in ("csv", "tsv"):
        import csv

        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        import datasets

        getattr(datasets.Dataset.from_list(ROWS), f"to_{kind}")(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst", "json", "csv", "tsv", "parquet"])
def test_kinds_of_files_give_the_same_records(tmp_path, kind):
    assert fields(write_rows(tmp_path, kind)) == ROWS


def test_json_file_that_holds_lines(tmp_path):
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert fields(tmp_path / "rows.json") == ROWS


def test_saved_dataset_and_arrow_file(tmp_path):
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "one"))
    assert fields(tmp_path / "one") == ROWS
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(str(tmp_path / "both"))
    assert fields(tmp_path / "both", split="test") == ROWS[:1]
    with pytest.raises(DataError, match=r"no split 'dev'; it has train, test"):
        fields(tmp_path / "both", split="dev")
    assert fields(next((tmp_path / "one").glob("*.arrow"))) == ROWS


def test_text_documents_end_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n\n  \nthree\n", encoding="utf-8")
    records = list(read_records(SourceConfig(path=str(tmp_path / "a.txt"))))
    assert [record.fields["text"] for record in records] == ["one\ntwo", "three"]
    assert [record.where.rpartition(" ")[2] for record in records] == ["1", "5"]


def test_folder_glob_and_limit(tmp_path):
    for number, row in enumerate(ROWS):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(row))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    assert fields(tmp_path) == ROWS
    assert fields(tmp_path / "part-[12].jsonl") == ROWS[1:3]
    assert len(list(read_records(SourceConfig(path=str(tmp_path)), limit=2))) == 2


def test_folder_with_splits_in_its_names_never_mixes_them(tmp_path):
    for name, row in zip(("train", "test", "val"), ROWS, strict=False):
        (tmp_path / f"{name}-00000.jsonl").write_text(json.dumps(row))
    assert fields(tmp_path) == ROWS[:1]
    assert fields(tmp_path, split="validation") == ROWS[2:3]
    (tmp_path / "val-00000.jsonl").unlink()
    with pytest.raises(DataError, match=r"no file of split 'validation'; file names indicate test, train"):
        fields(tmp_path, split="validation")


def test_where_names_file_and_first_line_of_a_record(tmp_path):
    path = write_rows(tmp_path, "csv")  # each record takes two lines, the header one
    assert [record.where for record in read_records(SourceConfig(path=str(path)))] == [
        f"{path} line {line}" for line in (2, 4, 6, 8, 10)
    ]


FAULTS = {
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"line 2: not valid JSON \(Expecting value at column"),
    "number.jsonl": (b'{"text": "a"}\n7\n', r"line 2: is int, but a record is a JSON object"),
    "deep.jsonl": (b"[" * 200_000, r"line 1: nested deeper than 100 levels"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"line 2: not UTF-8 text \(byte 0xe9 at offset 24\)"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), r"line 1: UTF-16 text. Save the file as UTF-8"),
    "broken.json": (b'[{"text": "a"},\n{"text" "b"}]', r"line 2: not valid JSON"),
    "list.json": (b'[{"text": "a"}, ["b"]]', r"line 1 \(record 2\): is list"),
    "short.csv": (b"text,label\na,b\nc\n", r"line 3: 1 values, but the header has 2 \(text, label\)"),
    "quote.csv": (b'text,label\na,"b"x\n', r"line 2: not valid CSV"),
    "twice.csv": (b"text,text\na,b\n", r"line 1: two columns have the same name"),
    "header.csv": (b"text,label\n", r"has no records"),
    "empty.jsonl": (b"", r"has no records"),
    "blank.txt": (b"\n \n", r"has no records"),
    "open.json": (b'[{"text": "a"},\n{"text": "b"', r"line 2: not valid JSON"),
    "after.json": (b'[{"text": "a"}]\n{"text": "b"}', r"line 2: not valid JSON \(text after the end of the array"),
    "comma.json": (b'[{"text": "a"}\n{"text": "b"}]', r"line 2: not valid JSON \(Expecting ',' or '\]' at column 1"),
    "latin.json": (b'[{"text": "a"},\n{"text": "\xe9"}]', r"line 2: not UTF-8 text \(byte 0xe9 at offset 26\)"),
    "deep.json": (b'[{"a": ' + b"[" * 200_000, r"line 1 \(record 1\): nested deeper than 100 levels"),
    "empty.json": (b"[]", r"has no records"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 1000)[:-20], r"damaged gzip data"),
    "not.jsonl.gz": (b"plain", r"damaged gzip data"),
    "cut.jsonl.zst": (zstandard.compress(b'{"text": "a"}\n' * 1000)[:-5], r"damaged zstd data \(it is truncated"),
    "flipped.jsonl.zst": (zstandard.compress(b'{"text": "a"}\n' * 1000)[:8] + bytes([255] * 24), r"damaged zstd data"),
    "not.jsonl.zst": (b"plain", r"damaged zstd data"),
    "broken.parquet": (b"PAR1nonsense", r"not a readable parquet file"),
    "data.pdf": (b"x", r"unknown file type '\.pdf'\. Known: \.jsonl"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_with_its_position(tmp_path, name):
    content, message = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        fields(tmp_path / name)
    assert str(raised.value).startswith(str(tmp_path / name))
    assert "\n" not in str(raised.value)


LONG = {
    "long.jsonl": (b'{"text": "a"}\n{"text": "', b'"}\n', r"line 2: a line of more than 16 MiB"),
    "long.json": (b'[{"text": "a"},\n{"text": "', b'"}]', r"line 2 \(record 2\): a record of more than 16 MiB"),
    "long.csv": (b'text\na\n"', b'"\n', r"line 3: a (line|row) of more than 16 MiB"),
    "long.txt": (b"a\n\n", b"\n", r"line 3: a line of more than 16 MiB"),
}


def test_a_decompression_bomb_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"text": "a"}\n{"text": "' + b"x" * 100 * 2**20))
    assert path.stat().st_size < 2**15
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"line 2: a line of more than 16 MiB"):
            fields(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("line_end", [b"", b"\n"])
def test_a_hundred_megabytes_in_one_record_are_refused_in_little_memory(tmp_path, name, line_end):
    start, end, message = LONG[name]
    if line_end and name == "long.jsonl":
        pytest.skip("its records end at line ends")
    with (tmp_path / name).open("wb") as file:
        file.write(start)
        for _ in range(100):
            file.write(b"x" * (2**20 - 1) + (line_end or b"x"))
        file.write(end)
    if line_end and name == "long.json":
        message = r"line 2: not valid JSON \(Invalid control character"
    elif line_end and name == "long.txt":
        message = r"line 3: a document of more than 16 MiB"
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            fields(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 150e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1000])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_arrays_do_not_depend_on_block_boundaries(tmp_path, monkeypatch, block_bytes, indent):
    rows = [{"n": n, "text": 'é"\\ \n' * (n % 7), "inner": [{"deep": [n, -1.5e3, None]}]} for n in range(60)]
    (tmp_path / "rows.json").write_text(f"  {json.dumps(rows, indent=indent, ensure_ascii=indent is None)}\n", "utf-8")
    monkeypatch.setattr("ft_dist.data.read.text_files.BLOCK_BYTES", block_bytes)
    found = list(read_records(SourceConfig(path=str(tmp_path / "rows.json"))))
    assert [record.fields for record in found] == rows
    lines = (tmp_path / "rows.json").read_text("utf-8").splitlines()
    if indent:
        assert [int(record.where.split()[2]) for record in found] == [
            number for number, line in enumerate(lines, start=1) if line == " {"
        ]


@pytest.mark.parametrize(
    "path", ["nowhere/train.jsonl", "nowhere.csv", "/nowhere/at/all", "./nowhere", "tests/nowhere"]
)
def test_a_missing_path_is_not_a_hub_error(path):
    with pytest.raises(DataError, match=r"neither a file, a folder, a glob that matches, nor a dataset on the hub"):
        fields(path)


def test_an_unreachable_hub_id_is_one_line(monkeypatch):
    import datasets

    def refuse(*_args, **_options):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"^nobody/nothing: neither .* \(Couldn't reach 'nobody/nothing' on the Hub\)\."
    ):
        fields("nobody/nothing")


def test_empty_folder_and_glob_without_match(tmp_path):
    with pytest.raises(DataError, match="holds no data file"):
        fields(tmp_path)
    with pytest.raises(DataError, match="matches no file"):
        fields(tmp_path / "*.jsonl")
