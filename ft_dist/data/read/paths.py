"""What a path of a source names: a file by its suffix, a prepared set, an MDS folder, a saved dataset or a hub id."""

import json
import re
from pathlib import Path
from typing import Any

from ft_dist.errors import DataError
from ft_dist.storage import is_remote_folder

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
TABLE_SUFFIXES = (".parquet", ".arrow")
MEGATRON_SUFFIX = ".idx"
SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES, MEGATRON_SUFFIX)
INDEX = "index.json"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
