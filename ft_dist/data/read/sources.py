"""Read the records of one source in any format, each with its file and line.

JSONL, JSON, CSV, TSV and text are read with the standard library (`text_files`), which keeps imports light. `datasets`
reads Parquet, Arrow, saved and hub datasets; our own readers read MDS folders and Megatron's `.bin` with `.idx`. Each
is imported when needed. A folder or URL that `ft-dist prepare` wrote holds no records (`paths.is_prepared_set`).
"""

import glob
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from ft_dist.config.schema import SourceConfig
from ft_dist.data.read.paths import (
    MEGATRON_SUFFIX,
    MOST_ENTRIES,
    SUFFIXES,
    TABLE_SUFFIXES,
    is_mds,
    is_prepared_set,
    is_saved_dataset,
    local_path,
    may_be_hub_id,
    missing,
    suffix_of,
)
from ft_dist.data.read.text_files import RawRecord, Record, read_csv, read_json, read_jsonl, read_text
from ft_dist.errors import DataError

_SPLITS = {"train": ("train", "training"), "test": ("test",), "validation": ("validation", "valid", "val", "dev")}


def read_records(source: SourceConfig, *, limit: int | None = None) -> Iterator[Record]:
    """Records in their stored order; `limit` stops after that many.

    Raises DataError for a path that does not exist, an empty file, a broken line or a wrong encoding.
    """
    return (raw.parse() for raw in islice(read_raw_records(source), limit))


def read_raw_records(source: SourceConfig) -> Iterator[Record | RawRecord]:
    """As `read_records`, with JSON lines left unparsed: parse them in another process, or skip them.

    Raises DataError as `read_records` does, but for a broken line only when it is parsed.
    """
    if is_prepared_set(source.path):
        raise DataError(
            f"{source.path}: a prepared set holds tokens, but text is needed here. Name the files it was made from."
        )
    files = local_files(source)
    if files is None:
        yield from _non_empty(_folder_reader(source), source.path)
        return
    for file in files:
        yield from _non_empty(_reader(file)(file), str(file))


def _folder_reader(source: SourceConfig) -> Iterator[Record]:
    """Reads folders that are one dataset (MDS, saved), and hub datasets."""
    folder = local_path(source.path)
    if is_mds(folder):
        from ft_dist.data.read.mds import read_mds

        return read_mds(folder)
    from ft_dist.data.read.tables import read_dataset

    return read_dataset(source)


def local_files(source: SourceConfig) -> list[Path] | None:
    """The files behind a source in reading order; None for a saved or a hub dataset.

    Raises DataError if the path is neither a file, a folder, a glob nor possibly a hub id.
    """
    path = local_path(source.path)
    if path.is_file():
        _reader(path)
        return [path]
    if path.is_dir():
        return None if is_saved_dataset(path) or is_mds(path) else _folder_files(path, source.split)
    if glob.has_magic(source.path):
        found = list(islice(glob.iglob(str(path), recursive=True), MOST_ENTRIES))
        if len(found) == MOST_ENTRIES:
            raise DataError(f"{source.path}: matches {MOST_ENTRIES:,} or more files. Name fewer, or their folder.")
        matches = sorted(Path(name) for name in found if os.path.isfile(name))
        if not matches:
            raise DataError(f"{source.path}: the pattern matches no file. Check data.*.path and the working directory.")
        for file in matches:
            _reader(file)
        return matches
    if may_be_hub_id(source.path):
        return None
    raise missing(source.path)


def _folder_files(folder: Path, split: str) -> list[Path]:
    """Every data file below a folder; if names mark splits, only those of `split`, so that none leaks."""
    entries = list(islice(_files_below(folder), MOST_ENTRIES))
    if len(entries) == MOST_ENTRIES:
        raise DataError(f"{folder}: {MOST_ENTRIES:,} or more files. Name the folder of the data, or a pattern.")
    found = [file for file in sorted(entries) if suffix_of(file) in SUFFIXES and not _hidden(file, folder)]
    found = [file for file in found if os.path.isfile(file)]
    if not found:
        known = " ".join(SUFFIXES)
        raise DataError(
            f"{folder}: the folder holds no data file ({known}, also with .gz or .zst). Point data.*.path at one."
        )
    splits = {file: _split_of(file, folder) for file in found}
    if not any(splits.values()):
        return found
    wanted = next((name for name, words in _SPLITS.items() if split == name or split in words), split)
    chosen = [file for file in found if splits[file] == wanted]
    if not chosen:
        names = ", ".join(sorted({name for name in splits.values() if name}))
        raise DataError(f"{folder}: no file of split {split!r}; file names indicate {names}. Set split to one of them.")
    return chosen


def _files_below(folder: Path) -> Iterator[Path]:
    """Raises DataError for a folder that cannot be read: its files would be missing without a word."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}). Make it readable, or name the folders of the data."
        )

    for place, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(place) / name for name in names)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _split_of(file: Path, folder: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower()))
    return next((name for name, aliases in _SPLITS.items() if words.intersection(aliases)), None)


def _reader(file: Path) -> Callable[[Path], Iterator[Record | RawRecord]]:
    suffix = suffix_of(file)
    if suffix in TABLE_SUFFIXES:
        return _read_table
    if suffix in (MEGATRON_SUFFIX, ".bin"):
        return _read_megatron
    readers: dict[str, Callable[[Path], Iterator[Record | RawRecord]]] = {
        ".jsonl": read_jsonl,
        ".ndjson": read_jsonl,
        ".json": read_json,
        ".csv": _read_commas,
        ".tsv": _read_tabs,
        ".txt": read_text,
    }
    if suffix not in readers:
        known = " ".join(SUFFIXES)
        raise DataError(
            f"{file}: unknown file type {suffix or 'without a suffix'!r}. Known: {known}, also with .gz or .zst."
        )
    return readers[suffix]


def _non_empty(records: Iterator[Record | RawRecord], name: str) -> Iterator[Record | RawRecord]:
    first = next(records, None)
    if first is None:
        raise DataError(f"{name}: has no records. Use a file with at least one, or remove it from data.")
    yield first
    yield from records


def _read_commas(file: Path) -> Iterator[Record]:
    return read_csv(file, ",")


def _read_tabs(file: Path) -> Iterator[Record]:
    return read_csv(file, "\t")


def _read_megatron(file: Path) -> Iterator[Record]:
    from ft_dist.data.read.megatron import read_megatron

    return read_megatron(file)


def _read_table(file: Path) -> Iterator[Record]:
    from ft_dist.data.read.tables import read_table

    return read_table(file)
