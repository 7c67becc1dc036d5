"""Records of a folder in mosaicml-streaming's MDS format, read without that library.

`index.json` lists the shards with their columns (names, encodings, fixed sizes) and files; a shard may be compressed as
a whole (`zip_data`). A shard is: uint32 samples; uint32 offsets, samples + 1, from the start of the file; a JSON copy
of its header; the samples. A sample is: uint32 sizes of its variable columns, then all columns in sequence. Source:
github.com/mosaicml/streaming, docs/source/preparing_datasets/dataset_format.md, base/format/mds/encodings.py.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from pydantic import Field

from ft_dist.data.read.paths import INDEX
from ft_dist.data.read.text_files import MAX_RECORD_BYTES, Record, check_depth, unreadable
from ft_dist.errors import DataError
from ft_dist.outside import Document, check_name, parse_object, validated

MAX_SHARD_BYTES = 2**30
"""Most bytes of a compressed shard that are held in memory; the format's writer makes shards of 64 MB"""

_NUMBERS = {
    "uint8": "u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8",
    "int8": "i1", "int16": "<i2", "int32": "<i4", "int64": "<i8",
    "float16": "<f2", "float32": "<f4", "float64": "<f8",
}  # fmt: skip
# the byte before an array whose type is not fixed: bits, plus 0 unsigned, 1 signed, 2 float
_ARRAY_TYPES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32",
    64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip
_SHAPE_BYTES = {0: 1, 1: 2, 2: 4, 3: 8}


class _File(Document):
    basename: str
    bytes: int = Field(ge=0)


class _Shard(Document):
    """A shard's entry in index.json."""

    raw_data: _File
    zip_data: _File | None = None
    compression: str | None = None
    samples: int = Field(ge=0)
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[Annotated[int, Field(ge=0)] | None]


def read_mds(folder: Path) -> Iterator[Record]:
    """Samples in stored order; `where` is `SHARD sample N`, from 1. At most one compressed shard is held in memory.

    Raises DataError for a shard that is missing, damaged or outside the folder, or a column encoding that holds neither
    text nor numbers.
    """
    index = folder / INDEX
    try:
        shards = parse_object(index.read_bytes(), where=index, error=DataError).get("shards")
    except OSError as error:
        raise unreadable(index, error) from None
    for number, entry in enumerate(shards if isinstance(shards, list) else []):
        where = f"{index}: shards[{number}]"
        shard = validated(entry if isinstance(entry, dict) else {}, _Shard, where=where, error=DataError)
        name = check_name(shard.raw_data.basename, where=where, error=DataError)
        try:
            yield from _samples(_content(folder, shard, where), shard, str(folder / name))
        except OSError as error:
            raise unreadable(folder / name, error) from None
        except (KeyError, ValueError, IndexError, TypeError, OverflowError, RecursionError) as error:
            raise DataError(f"{folder / name}: a damaged MDS shard ({error}). Write it again.") from None


def _content(folder: Path, shard: _Shard, where: str) -> Any:
    raw, size = folder / shard.raw_data.basename, shard.raw_data.bytes
    if raw.is_file():
        found = raw.stat().st_size
        if found != size:
            raise DataError(f"{raw}: {found} bytes instead of {size}. Fetch it again.")
        return np.memmap(raw, np.uint8, mode="r")
    path = raw
    if shard.zip_data is not None:
        path = folder / check_name(shard.zip_data.basename, where=where, error=DataError)
    if not path.is_file():
        raise DataError(f"{path}: listed in index.json, but missing. Fetch it again.")
    if size > MAX_SHARD_BYTES:
        raise DataError(f"{path}: unpacks to {size} bytes, over the limit of {MAX_SHARD_BYTES}. Write smaller shards.")
    content = _unpack(path, shard.compression or "", size)
    if len(content) != size:
        raise DataError(f"{path}: unpacks to another size than {size} bytes. Fetch it again.")
    return np.frombuffer(content, np.uint8)


def _unpack(path: Path, compression: str, size: int) -> bytes:
    """The unpacked bytes, or the first `size` + 1 of them: a small file can unpack to any size."""
    algorithm = compression.partition(":")[0]
    if algorithm not in ("zstd", "gz"):
        raise DataError(f"{path}: compression {compression[:20]!r} is not supported. Write it with zstd, gz or none.")
    try:
        with path.open("rb") as file:
            return _at_most(_unpacking(file, algorithm), size + 1)
    except Exception as error:  # each library raises its own exceptions for damaged data
        raise DataError(f"{path}: damaged {algorithm} data ({error}). Fetch it again.") from None


def _unpacking(file: BinaryIO, algorithm: str) -> Any:
    if algorithm == "gz":
        return gzip.GzipFile(fileobj=file)
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)


def _at_most(stream: Any, limit: int) -> bytes:
    content = bytearray()
    while len(content) < limit and (block := stream.read(min(2**20, limit - len(content)))):
        content += block
    return bytes(content)


def _samples(content: Any, shard: _Shard, name: str) -> Iterator[Record]:
    count = int(content[:4].view("<u4")[0])
    if count != shard.samples:
        raise DataError(f"{name}: holds {count} samples, but index.json says {shard.samples}. Fetch it again.")
    offsets = content[4 : 4 + 4 * (count + 1)].view("<u4")
    columns = list(zip(shard.column_names, shard.column_encodings, shard.column_sizes, strict=True))
    decoders = {column: _decoder(encoding, f"{name}: column {column}") for column, encoding, _ in columns}
    for number in range(count):
        where = f"{name} sample {number + 1}"
        begin, end = int(offsets[number]), int(offsets[number + 1])
        if not 0 <= end - begin <= MAX_RECORD_BYTES or end > len(content):
            raise DataError(
                f"{where}: at bytes {begin} to {end} of {len(content)}; the limit is {MAX_RECORD_BYTES / 2**20:g} MiB."
            )
        sample = content[begin:end].tobytes()
        variable = sum(size is None for _, _, size in columns)
        sizes = iter(np.frombuffer(sample, "<u4", variable).tolist())
        at, fields = 4 * variable, {}
        for column, _, fixed in columns:
            size = next(sizes) if fixed is None else fixed
            fields[column] = decoders[column](sample[at : at + size])
            at += size
        if at != len(sample):
            raise DataError(f"{where}: its columns take {at} bytes of {len(sample)}. Fetch the shard again.")
        check_depth(fields, where)
        yield Record(fields, where)


def _decoder(encoding: str, where: str) -> Callable[[bytes], Any]:
    kind, _, rest = encoding.partition(":")
    if kind == "str":
        return lambda data: data.decode("utf-8")
    if kind == "json":
        return json.loads
    if kind in ("int", "str_int"):
        return (lambda data: int(np.frombuffer(data, "<i8")[0])) if kind == "int" else (lambda data: int(data))
    if kind == "str_float":
        return float
    if kind == "ndarray":
        return _array(rest)
    if kind in _NUMBERS:
        return lambda data: np.frombuffer(data, _NUMBERS[kind])[0].item()
    if kind in ("bytes", "pkl", "jpeg", "png", "pil", "jpeg_array", "jpegarray", "list[jpeg]", "list[pil]"):
        # never unpickled, and images are not used: a column that the format does not read is skipped
        return lambda data: data
    raise DataError(f"{where}: encoding {encoding!r} is not supported. Write the column as str, json or ndarray.")


def _array(spec: str) -> Callable[[bytes], Any]:
    """`ndarray`, `ndarray:dtype` or `ndarray:dtype:shape`: what is not fixed precedes the values."""
    dtype, _, shape = spec.partition(":")

    def decode(data: bytes) -> Any:
        at = 0
        kind = dtype
        if not kind:
            kind, at = _ARRAY_TYPES[data[0]], 1
        if not shape:
            dimensions, size_bytes = data[at] >> 2, _SHAPE_BYTES[data[at] & 3]
            at += 1 + dimensions * size_bytes
        return np.frombuffer(data, _NUMBERS[kind], offset=at).reshape(-1)

    return decode
