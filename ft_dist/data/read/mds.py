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
from typing import Any

import numpy as np

from ft_dist.data.read.text_files import MAX_RECORD_BYTES, Record
from ft_dist.errors import DataError

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


def read_mds(folder: Path) -> Iterator[Record]:
    """Samples in stored order; `where` is `SHARD sample N`, from 1. At most one compressed shard is held in memory.

    Raises DataError for a shard that is missing or damaged, or a column encoding that holds neither text nor numbers.
    """
    for shard in json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]:
        try:
            name = shard["raw_data"]["basename"]
            content = _content(folder, shard)
            yield from _samples(content, shard, str(folder / name))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise DataError(f"{folder}: a damaged MDS shard ({error}). Write it again.") from None


def _content(folder: Path, shard: dict[str, Any]) -> Any:
    raw = folder / shard["raw_data"]["basename"]
    if raw.is_file():
        size = raw.stat().st_size
        if size != shard["raw_data"]["bytes"]:
            raise DataError(f"{raw}: {size} bytes instead of {shard['raw_data']['bytes']}. Fetch it again.")
        return np.memmap(raw, np.uint8, mode="r")
    packed = shard.get("zip_data")
    path = folder / packed["basename"] if packed else raw
    if not path.is_file():
        raise DataError(f"{path}: listed in index.json, but missing. Fetch it again.")
    content = _unpack(path, str(shard.get("compression") or ""))
    if len(content) != shard["raw_data"]["bytes"]:
        raise DataError(f"{path}: unpacks to {len(content)} bytes, not {shard['raw_data']['bytes']}. Fetch it again.")
    return np.frombuffer(content, np.uint8)


def _unpack(path: Path, compression: str) -> bytes:
    algorithm = compression.partition(":")[0]
    try:
        if algorithm == "zstd":
            import zstandard

            return zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True).read()
        if algorithm == "gz":
            return gzip.decompress(path.read_bytes())
    except Exception as error:  # each library raises its own exceptions for damaged data
        raise DataError(f"{path}: damaged {algorithm} data ({error}). Fetch it again.") from None
    raise DataError(f"{path}: compression {compression!r} is not supported. Write it with zstd, gz or none.")


def _samples(content: Any, shard: dict[str, Any], name: str) -> Iterator[Record]:
    count = int(content[:4].view("<u4")[0])
    if count != shard["samples"]:
        raise DataError(f"{name}: holds {count} samples, but index.json says {shard['samples']}. Fetch it again.")
    offsets = content[4 : 4 + 4 * (count + 1)].view("<u4")
    columns = list(zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True))
    decoders = {column: _decoder(encoding, f"{name}: column {column}") for column, encoding, _ in columns}
    for number in range(count):
        where = f"{name} sample {number + 1}"
        begin, end = int(offsets[number]), int(offsets[number + 1])
        if end - begin > MAX_RECORD_BYTES:
            raise DataError(f"{where}: {end - begin} bytes, over the limit of {MAX_RECORD_BYTES / 2**20:g} MiB.")
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
