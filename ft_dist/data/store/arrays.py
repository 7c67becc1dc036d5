"""Map the arrays of a safetensors file without reading them. Nothing in the file is trusted: see `map_arrays`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ft_dist.errors import DataError, StorageError
from ft_dist.outside import Document, parse_object, validated
from ft_dist.storage.retry import patiently

MOST_HEADER_BYTES = 2**20
"""Ours have a few hundred"""

DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I32": np.int32, "I64": np.int64, "U64": np.uint64}


class _Entry(Document):
    dtype: str
    data_offsets: tuple[int, int]
    shape: list[int] = Field(default_factory=list)


def map_arrays(path: Path, names: Sequence[str], *, optional: Sequence[str] = ()) -> dict[str, npt.NDArray[Any]]:
    """Flat arrays by name, with those of `optional` that exist. A file is an 8-byte length, a JSON header, and data.

    Raises StorageError if the file cannot be read, DataError if it is not such a file: every length and offset is
    compared with the size of the file before anything is allocated or mapped.
    """
    try:
        return patiently(lambda: _map_arrays(path, names, optional))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error}). Run again when it can.") from None


def _map_arrays(path: Path, names: Sequence[str], optional: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(size - 8, MOST_HEADER_BYTES):
            raise DataError(f"{path}: damaged (its header says that it has {header_bytes} bytes, the file has {size}).")
        header = parse_object(file.read(header_bytes), where=path, error=DataError)
    wanted = [*names, *(name for name in optional if name in header)]
    entries = {name: _entry(header, name, path=path) for name in wanted}
    whole = np.asarray(np.memmap(path, np.uint8, mode="r"))  # the subclass is slow to index
    arrays = {}
    for name, entry in entries.items():
        start, end = entry.data_offsets
        dtype = np.dtype(DTYPES[entry.dtype])
        if not 0 <= start <= end <= size - 8 - header_bytes or (end - start) % dtype.itemsize:
            raise DataError(f"{path}: damaged (its array {name} lies at bytes {start} to {end} of {size}).")
        arrays[name] = whole[8 + header_bytes + start : 8 + header_bytes + end].view(dtype)
    return arrays


def _entry(header: dict[str, Any], name: str, *, path: Path) -> _Entry:
    found = header.get(name)
    if not isinstance(found, dict):
        raise DataError(f"{path}: damaged (it holds no array {name}).")
    entry = validated(found, _Entry, where=f"{path}: {name}", error=DataError)
    if entry.dtype not in DTYPES:
        raise DataError(f"{path}: damaged (its array {name} is of type {entry.dtype[:20]}).")
    return entry
