"""What a path of a source names: a file by its suffix, a prepared set, an MDS folder, a saved dataset or a hub id."""

import os
import re
from pathlib import Path
from typing import Any

from ft_dist.errors import DataError
from ft_dist.outside import expand_home, parse_object
from ft_dist.storage import is_remote_folder

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
TABLE_SUFFIXES = (".parquet", ".arrow")
MEGATRON_SUFFIX = ".idx"
SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES, MEGATRON_SUFFIX)
INDEX = "index.json"
LENGTHS = "lengths.safetensors"
UNKNOWN = "unknown"
"""Revision of a hub dataset if the hub does not answer"""
MOST_ENTRIES = 200_000
"""Files and folders below one source; a folder with more is hardly one that was meant"""
CACHE_ADVICE = "Set data.cache_dir to a writable folder."
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def cache_folder(cache_dir: str | None) -> Path:
    """The folder of prepared data, in data.cache_dir, $FT_DIST_CACHE or ~/.cache/ft_dist; it need not exist yet.

    Raises DataError if it cannot be created or written to.
    """
    root = cache_dir or os.environ.get("FT_DIST_CACHE") or "~/.cache/ft_dist"
    folder = expand_home(root, error=DataError) / "data"
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "not writable" if existing.is_dir() else "not a folder"
        raise DataError(f"{folder}: {existing} is {reason}. {CACHE_ADVICE}")
    return folder


def is_prepared_set(path: str) -> bool:
    """Whether `ft-dist prepare` wrote this folder, damaged or not. A URL can hold nothing else.

    Raises DataError as `local_path` does.
    """
    if is_remote_folder(path):
        return True
    folder = local_path(path.removeprefix("file://"))
    index = _read_index(folder)
    return (index is not None and "fingerprint" in index) or (folder / LENGTHS).is_file()


def local_path(path: str) -> Path:
    """The local path that a source names, with `~` expanded; nothing need exist there.

    Raises DataError for a path that no file system can hold or that may not be looked at, and for the root folder.
    """
    if not path.strip() or not path.isprintable():
        raise DataError(f"{path!r}: not a path. Name a file, a folder, a pattern or a dataset.")
    try:
        found = Path(path).expanduser()
        os.stat(found)
        if found.resolve() == Path(found.resolve().anchor):
            raise DataError(f"{path}: this is the root of the file system. Name the folder of the data.")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return Path(path).expanduser()
    except OSError as error:
        shown = path if len(path) <= 100 else f"{path[:97]}..."
        raise DataError(f"{shown}: cannot be read ({error.strerror}). Check the path and its permissions.") from None
    except (ValueError, RuntimeError) as error:  # a null character; a home of nobody
        raise DataError(f"{path!r}: not a path ({error}). Correct it.") from None


def is_mds(folder: Path) -> bool:
    """Whether mosaicml-streaming's MDSWriter wrote this folder."""
    index = _read_index(folder)
    shards = index.get("shards") if index else None
    first = shards[0] if isinstance(shards, list) and shards else None
    return isinstance(first, dict) and first.get("format") == "mds"


def _read_index(folder: Path) -> dict[str, Any] | None:
    """The object in a folder's index.json, whoever wrote it; None if there is none."""
    try:
        return parse_object((folder / INDEX).read_bytes(), where=folder / INDEX, error=DataError)
    except (OSError, DataError):
        return None


def suffix_of(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz").removesuffix(".zst")
    return name[name.rfind(".") :] if "." in name else ""


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
        or (str(parent) != "." and parent.is_dir())  # a typo in a local path, not a hub owner
    )
    return bool(_HUB_ID.fullmatch(name)) and not looks_local
