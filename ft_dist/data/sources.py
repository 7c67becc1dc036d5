"""Read the records of one source, whatever it is stored in, and always know which file and line each came from.

JSONL, JSON, CSV, TSV and text are read with the standard library, a line at a time, so that a mistake is told with its
line and nothing heavy is imported. Parquet, Arrow, saved datasets and hub datasets go through `datasets`, imported
only then. A text file holds documents separated by blank lines; each document becomes one record `{"text": ...}`.
"""

import csv
import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from ft_dist.config.schema import SourceConfig
from ft_dist.errors import DataError
from ft_dist.storage import is_url


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a source: its fields as they stand there, and where that is (`FILE line N`)."""

    fields: dict[str, Any]
    where: str


TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
TABLE_SUFFIXES = (".parquet", ".arrow")
_SPLITS = {"train": ("train", "training"), "test": ("test",), "validation": ("validation", "valid", "val", "dev")}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_records(source: SourceConfig, *, limit: int | None = None) -> Iterator[Record]:
    """Records in their stored order; `limit` stops after that many.

    Raises DataError for a path that leads nowhere, an empty file, a broken line or a wrong encoding.
    """
    return islice(_read_all(source), limit)


def _read_all(source: SourceConfig) -> Iterator[Record]:
    files = local_files(source)
    if files is None:
        from ft_dist.data.tables import read_dataset

        yield from _non_empty(read_dataset(source), source.path)
        return
    for file in files:
        yield from _non_empty(_reader(file)(file), str(file))


def local_files(source: SourceConfig) -> list[Path] | None:
    """The files behind a source in reading order; None for a saved or a hub dataset.

    Raises DataError where the path is neither a file, a folder, a glob nor possibly a hub id.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        _reader(path)
        return [path]
    if path.is_dir():
        return None if is_saved_dataset(path) else _folder_files(path, source.split)
    if glob.has_magic(source.path):
        matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not matches:
            raise DataError(f"{source.path}: the pattern matches no file. Check data.*.path and the working directory.")
        for file in matches:
            _reader(file)
        return matches
    if may_be_hub_id(source.path):
        return None
    raise missing(source.path)


def missing(path: str, detail: str = "") -> DataError:
    suffix = f" ({detail})" if detail else ""
    return DataError(
        f"{path}: neither a file, a folder, a glob that matches, nor a dataset on the hub{suffix}. "
        "Check the spelling and the working directory."
    )


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def may_be_hub_id(path: str) -> bool:
    name = path.removeprefix("hf://datasets/").removeprefix("hf://")
    parent = Path(path).parent
    looks_local = (
        _suffix(Path(name)) in TEXT_SUFFIXES + TABLE_SUFFIXES
        or name.startswith(".")
        or (str(parent) != "." and parent.is_dir())  # a slip in a local path, not a hub owner
    )
    return bool(_HUB_ID.fullmatch(name)) and not looks_local


def is_remote_set(path: str) -> bool:
    """Whether a source's path is the URL of a prepared set; records are read from files here and from the hub."""
    return is_url(path) and not may_be_hub_id(path)


def is_table(file: Path) -> bool:
    return _suffix(file) in TABLE_SUFFIXES


def _folder_files(folder: Path, split: str) -> list[Path]:
    """Every data file below a folder; where names tell splits apart, those of `split` only, so that none leaks."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _hidden(file, folder)]
    found = [file for file in found if _suffix(file) in TEXT_SUFFIXES + TABLE_SUFFIXES]
    if not found:
        known = " ".join(TEXT_SUFFIXES + TABLE_SUFFIXES)
        raise DataError(f"{folder}: the folder holds no data file ({known}, also with .gz). Point data.*.path at one.")
    splits = {file: _split_of(file, folder) for file in found}
    if not any(splits.values()):
        return found
    wanted = next((name for name, words in _SPLITS.items() if split == name or split in words), split)
    chosen = [file for file in found if splits[file] == wanted]
    if not chosen:
        names = ", ".join(sorted({name for name in splits.values() if name}))
        raise DataError(f"{folder}: no file of split {split!r}; the names say {names}. Set split to one of them.")
    return chosen


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _split_of(file: Path, folder: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower()))
    return next((name for name, aliases in _SPLITS.items() if words.intersection(aliases)), None)


def _suffix(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz")
    return name[name.rfind(".") :] if "." in name else ""


def _reader(file: Path) -> Callable[[Path], Iterator[Record]]:
    suffix = _suffix(file)
    if suffix in TABLE_SUFFIXES:
        return _read_table
    readers = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".txt": _read_text,
    }
    if suffix not in readers:
        known = " ".join(TEXT_SUFFIXES + TABLE_SUFFIXES)
        raise DataError(f"{file}: unknown file type {suffix or 'without a suffix'!r}. Known: {known}, also with .gz.")
    return readers[suffix]


def _non_empty(records: Iterator[Record], name: str) -> Iterator[Record]:
    first = next(records, None)
    if first is None:
        raise DataError(f"{name}: holds no record. Give a file with at least one, or take it out of data.")
    yield first
    yield from records


def _read_table(file: Path) -> Iterator[Record]:
    from ft_dist.data.tables import read_table

    return read_table(file)


def _open(file: Path) -> BinaryIO:
    try:
        if file.name.lower().endswith(".gz"):
            return cast(BinaryIO, gzip.open(file))
        return file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Check its permissions.") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text with its line end), decoded a line at a time so that a bad byte has a line."""
    number, offset = 0, 0
    with _open(file) as stream:
        try:
            for number, raw in enumerate(stream, start=1):
                yield number, _decode(raw, file, number, offset)
                offset += len(raw)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{file} after line {number}: damaged gzip data ({error}). Fetch it again.") from None


def _decode(raw: bytes, file: Path, number: int, offset: int) -> str:
    if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{file} line 1: UTF-16 text. Save the file as UTF-8.")
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} line {number}: not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {offset + error.start}). "
            "Save the file as UTF-8."
        ) from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno}). Mend or remove it.") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deep to read. Mend or remove it.") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: holds {type(value).__name__}, but a record is a JSON object {{...}}.")
    return value


def _read_jsonl(file: Path) -> Iterator[Record]:
    for number, line in _lines(file):
        if line.strip():
            where = f"{file} line {number}"
            yield Record(_object(_parse(line, where), where), where)


def _read_json(file: Path) -> Iterator[Record]:
    """An array of objects, or, as many `.json` files really are, JSON lines."""
    text_of_lines = [line for _, line in _lines(file)]
    text = "".join(text_of_lines)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(file)
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file} line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}). Mend or remove it."
        ) from None
    except RecursionError:
        raise DataError(f"{file}: JSON nested too deep to read. Mend it.") from None
    for number, value in enumerate(values, start=1):
        where = f"{file} record {number}"
        yield Record(_object(value, where), where)


def _read_csv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if _suffix(file) == ".tsv" else ","
    rows = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(f"{file} line {start}: not valid CSV ({error}). Check its quotes.") from None
        if row is None:
            return
        where, start = f"{file} line {start}", rows.line_num + 1
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            if len(set(header)) < len(header):
                raise DataError(f"{where}: two columns of the header have one name ({', '.join(header)}). Rename one.")
            continue
        if len(row) != len(header):
            raise DataError(f"{where}: {len(row)} values, but the header has {len(header)} ({', '.join(header)}).")
        yield Record(dict(zip(header, row, strict=True)), where)


def _read_text(file: Path) -> Iterator[Record]:
    block: list[str] = []
    start = 1
    for number, line in _lines(file):
        if line.strip():
            if not block:
                start = number
            block.append(line)
        elif block:
            yield Record({"text": "".join(block).rstrip("\r\n")}, f"{file} line {start}")
            block = []
    if block:
        yield Record({"text": "".join(block).rstrip("\r\n")}, f"{file} line {start}")
