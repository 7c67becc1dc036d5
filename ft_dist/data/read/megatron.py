"""Documents of Megatron-LM's indexed datasets (`NAME.idx` and `NAME.bin`): token ids.

The index, little-endian: magic `MMIDIDX\\0\\0`; uint64 version 1; uint8 code of the dtype; uint64 sequences; uint64
documents (document boundaries, one more than documents); int32 length of each sequence; int64 byte offset of each;
int64 index of the first sequence of each document, ending with the number of sequences.
Source: github.com/NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ft_dist.data.read.text_files import MAX_RECORD_BYTES, Record
from ft_dist.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


def read_megatron(file: Path) -> Iterator[Record]:
    """One record `{"tokens": int64 array}` per document, given either file; both are memory-mapped.

    Raises DataError if a file is missing, or if the index has another format or points past the end of the tokens.
    """
    index_path, tokens_path = file.with_suffix(".idx"), file.with_suffix(".bin")
    for path in (index_path, tokens_path):
        if not path.is_file():
            raise DataError(f"{path}: missing; a Megatron dataset is an .idx and a .bin file of the same name.")
    dtype, lengths, offsets, documents = _read_index(index_path)
    if not len(lengths):
        return
    tokens = np.memmap(tokens_path, np.uint8, mode="r") if tokens_path.stat().st_size else np.zeros(0, np.uint8)
    if int(lengths.min()) < 0 or int(offsets.min()) < 0 or int(offsets.max()) > len(tokens):
        raise DataError(f"{index_path}: points outside {tokens_path.name} ({len(tokens)} bytes). Fetch both again.")
    ends = offsets + lengths.astype(np.int64) * np.dtype(dtype).itemsize
    if int(ends.max()) > len(tokens):
        raise DataError(f"{tokens_path}: {len(tokens)} bytes, but its index needs {int(ends.max())}. Fetch it again.")
    for number, (first, last) in enumerate(zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True), start=1):
        where = f"{tokens_path} document {number}"
        size = int(lengths[first:last].astype(np.int64).sum()) * np.dtype(dtype).itemsize
        if size > MAX_RECORD_BYTES:
            raise DataError(f"{where}: {size} bytes, over the limit of {MAX_RECORD_BYTES / 2**20:g} MiB.")
        parts = [tokens[offsets[n] : ends[n]].view(dtype) for n in range(first, last)]
        whole = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
        if len(whole):  # preprocess_data.py writes empty documents for empty lines
            yield Record({"tokens": whole}, where)


def _read_index(path: Path) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise DataError(f"{path}: not a Megatron index (it should begin with MMIDIDX).")
    version = int.from_bytes(header[9:17], "little")
    if version != 1 or header[17] not in _DTYPES or header[17] in (6, 7):
        raise DataError(f"{path}: index of version {version} with dtype code {header[17]}; use version 1 and integers.")
    sequences, boundaries = (int.from_bytes(header[at : at + 8], "little") for at in (18, 26))
    content = np.memmap(path, np.uint8, mode="r")
    needed = _HEADER_BYTES + 12 * sequences + 8 * boundaries
    if len(content) < needed:
        raise DataError(f"{path}: {len(content)} bytes instead of {needed}. Fetch it again.")
    at = _HEADER_BYTES + 4 * sequences
    lengths = content[_HEADER_BYTES:at].view("<i4")
    offsets = content[at : at + 8 * sequences].view("<i8")
    documents = content[at + 8 * sequences : needed].view("<i8")
    rise = boundaries > 0 and int(documents[0]) >= 0 and bool((documents[1:] >= documents[:-1]).all())
    if not rise or int(documents[-1]) != sequences:
        raise DataError(f"{path}: the document boundaries do not end at its {sequences} sequences. Fetch it again.")
    return _DTYPES[header[17]], lengths, offsets, documents
