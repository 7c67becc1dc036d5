"""Records of Parquet and Arrow files, saved and hub datasets, through `datasets` in streaming mode.

`datasets` is imported only here, inside functions: the import takes a second, and most sources do not need it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ft_dist.config.schema import SourceConfig
from ft_dist.data.read.paths import UNKNOWN, is_saved_dataset, local_path, missing
from ft_dist.data.read.text_files import Record
from ft_dist.errors import DataError, first_line


def read_table(file: Path) -> Iterator[Record]:
    """Rows of one `.parquet` or `.arrow` file, numbered from 1."""
    import datasets

    kind = "parquet" if file.suffix.lower() == ".parquet" else "arrow"
    try:
        rows = datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
        yield from numbered_rows(rows, str(file))
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise a dozen exception types for a damaged file
        raise DataError(f"{file}: not a readable {kind} file ({first_line(error)}). Write it again.") from None


def read_dataset(source: SourceConfig) -> Iterator[Record]:
    """Rows of a `save_to_disk` folder or of a hub dataset's split."""
    yield from numbered_rows(open_dataset(source), source.path)


def open_dataset(source: SourceConfig) -> Any:
    """The `datasets.IterableDataset` of a `save_to_disk` folder or of a hub dataset's split, not read yet."""
    import datasets

    path = local_path(source.path)
    if is_saved_dataset(path):
        saved = datasets.load_from_disk(str(path))
        if hasattr(saved, "keys"):
            if source.split not in saved:
                names = ", ".join(saved.keys())
                raise DataError(f"{source.path}: no split {source.split!r}; it has {names}. Set split to one of them.")
            saved = saved[source.split]
        return saved.to_iterable_dataset()
    name = source.path.removeprefix("hf://datasets/").removeprefix("hf://")
    try:
        revision = hub_revision(source)
        pinned = None if revision == UNKNOWN else revision
        return datasets.load_dataset(name, source.name, split=source.split, streaming=True, revision=pinned)
    except Exception as error:  # offline, no such dataset or split, gated: one line for the user
        raise missing(source.path, first_line(error)) from None


def hub_revision(source: SourceConfig) -> str:
    """The commit of a hub dataset's default branch; UNKNOWN if the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        name = source.path.removeprefix("hf://datasets/").removeprefix("hf://")
        return str(HfApi().dataset_info(name, timeout=10).sha)
    except Exception:  # offline: the cached copy is read, identified by path and split
        return UNKNOWN


def numbered_rows(rows: Iterable[Any], name: str, *, first: int = 1) -> Iterator[Record]:
    """Records with their number, counted from `first`."""
    for number, fields in enumerate(rows, start=first):
        yield Record(dict(fields), f"{name} row {number}")
