"""Read the records of one source, whatever it is stored in, and always know which file and line each came from.

JSONL, JSON, CSV, TSV and text are read with the standard library (`text_files`), so that nothing heavy is imported.
Parquet, Arrow, saved datasets and hub datasets go through `datasets`, MDS folders and Megatron's `.bin` with `.idx`
through readers of our own, each imported only then. A folder or URL that `ft-dist prepare` wrote is no source of
records: `prepared_set` tells it from the others.
"""

import glob
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ft_dist.config.schema import SourceConfig
from ft_dist.data.read.text_files import RawRecord, Record, read_csv, read_json, read_jsonl, read_text
from ft_dist.errors import DataError
from ft_dist.storage import is_remote_folder

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
TABLE_SUFFIXES = (".parquet", ".arrow")
MEGATRON_SUFFIX = ".idx"
SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES, MEGATRON_SUFFIX)
INDEX = "index.json"
_SPLITS = {"train": ("train", "training"), "test": ("test",), "validation": ("validation", "valid", "val", "dev")}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_records(source: SourceConfig, *, limit: int | None = None) -> Iterator[Record]:
    """Records in their stored order; `limit` stops after that many.

    Raises DataError for a path that leads nowhere, an empty file, a broken line or a wrong encoding.
    """
    return (raw.parse() for raw in islice(read_raw_records(source), limit))


def read_raw_records(source: SourceConfig) -> Iterator[Record | RawRecord]:
    """As `read_records`, JSON lines left unparsed: `parse` them on another core, or pass them by.

    Raises DataError as `read_records` does, for a broken line only when it is parsed.
    """
    if prepared_set(source.path) is not None:
        raise DataError(
            f"{source.path}: a prepared set holds tokens, not the text that is needed here. Name the files it was "
            "made from."
        )
    files = local_files(source)
    if files is None:
        yield from _non_empty(_folder_reader(source), source.path)
        return
    for file in files:
        yield from _non_empty(_reader(file)(file), str(file))


def _folder_reader(source: SourceConfig) -> Iterator[Record]:
    """Folders that are one set in a format of their own, and hub datasets."""
    folder = Path(source.path).expanduser()
    if is_mds(folder):
        from ft_dist.data.read.mds import read_mds

        return read_mds(folder)
    from ft_dist.data.read.tables import read_dataset

    return read_dataset(source)


def prepared_set(path: str) -> dict[str, Any] | None:
    """The index of a folder that `ft-dist prepare` wrote, {} for a URL (it can hold nothing else), else None."""
    if is_remote_folder(path):
        return {}
    index = _read_index(Path(path.removeprefix("file://")).expanduser())
    return index if index is not None and "fingerprint" in index else None


def is_mds(folder: Path) -> bool:
    """Whether mosaicml-streaming's MDSWriter wrote this folder."""
    index = _read_index(folder)
    shards = index.get("shards") if index else None
    return isinstance(shards, list) and bool(shards) and shards[0].get("format") == "mds"


def _read_index(folder: Path) -> dict[str, Any] | None:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) else None


def local_files(source: SourceConfig) -> list[Path] | None:
    """The files behind a source in reading order; None for a saved or a hub dataset.

    Raises DataError where the path is neither a file, a folder, a glob nor possibly a hub id.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        _reader(path)
        return [path]
    if path.is_dir():
        return None if is_saved_dataset(path) or is_mds(path) else _folder_files(path, source.split)
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
        suffix_of(Path(name)) in SUFFIXES
        or name.startswith(".")
        or (str(parent) != "." and parent.is_dir())  # a slip in a local path, not a hub owner
    )
    return bool(_HUB_ID.fullmatch(name)) and not looks_local


def _folder_files(folder: Path, split: str) -> list[Path]:
    """Every data file below a folder; where names tell splits apart, those of `split` only, so that none leaks."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _hidden(file, folder)]
    found = [file for file in found if suffix_of(file) in SUFFIXES]
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
        raise DataError(f"{folder}: no file of split {split!r}; the names say {names}. Set split to one of them.")
    return chosen


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _split_of(file: Path, folder: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower()))
    return next((name for name, aliases in _SPLITS.items() if words.intersection(aliases)), None)


def suffix_of(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz").removesuffix(".zst")
    return name[name.rfind(".") :] if "." in name else ""


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
        raise DataError(f"{name}: holds no record. Give a file with at least one, or take it out of data.")
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
