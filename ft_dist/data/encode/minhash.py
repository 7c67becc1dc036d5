"""A record's sketch, for comparison with others: keys for equality, a MinHash signature for similarity.

Keys are 64-bit hashes of text without case and spacing. A signature is one-permutation MinHash over the text's 8-byte
shingles: each shingle's hash falls into one of BUCKETS, and a bucket keeps the smallest. The share of equal buckets
estimates the Jaccard similarity of two shingle sets with a deviation of sqrt(J (1 - J) / BUCKETS), under 0.04 above
0.9. Sources: Broder, "On the resemblance and containment of documents" (1997); Li, Owen, Zhang, "One Permutation
Hashing" (2012). All records of a chunk are processed together, in about twenty nanoseconds per byte.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ft_dist.data.read.formats import Sample

WHOLE, PROMPT, ANSWER, RECORD = range(4)
"""Columns of the keys"""
KEYS = 4
BUCKETS = 64
SHINGLE_BYTES = 8
MIN_SHINGLES = 100
"""Shorter texts (one-line questions, labels) are similar by chance, so they are compared for equality only"""
EMPTY = np.uint32(2**32 - 1)
_NO_SIGNATURE = np.full(BUCKETS, EMPTY, np.uint32)

Keys = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]


def sketch(samples: Sequence[Sample], numbers: Sequence[int], *, signatures: bool) -> tuple[Keys, Signatures]:
    """(n, KEYS) uint64: hashes of whole, prompt and answer, then the record's number; (n or 0, BUCKETS) uint32.

    The answer is the last assistant turn, the prompt everything before it; plain text and tokens have prompt key 0. A
    text with fewer than MIN_SHINGLES shingles gets a signature of EMPTY buckets.
    """
    keys = np.zeros((len(samples), KEYS), np.uint64)
    wholes = []
    for row, (sample, number) in enumerate(zip(samples, numbers, strict=True)):
        prompt, answer, compared = _texts(sample)
        keys[row] = (
            _hash(prompt + b"\x00" + answer),
            _hash(prompt) if prompt else 0,
            _hash(answer),
            number,
        )
        wholes.append(compared)
    if not signatures:
        return keys, np.zeros((0, BUCKETS), np.uint32)
    return keys, _minhash(wholes)


def _texts(sample: Sample) -> tuple[bytes, bytes, bytes]:
    """(prompt, answer, text compared for similarity): a system prompt that all records share is left out."""
    if sample.tokens is not None:
        ids = np.asarray(sample.tokens, np.uint32).tobytes()
        return b"", ids, ids
    if sample.messages is None:
        text = _normal(sample.text or "")
        return b"", text, text
    turns = [(str(message["role"]), _content(message)) for message in sample.messages]
    last = max(index for index, (role, _) in enumerate(turns) if role == "assistant")
    prompt = b"\x01".join(role.encode() + b":" + text for role, text in turns[:last])
    spoken = b" ".join(text for role, text in turns[: last + 1] if role not in ("system", "developer"))
    return prompt, turns[last][1], spoken


def _content(message: dict[str, Any]) -> bytes:
    calls = message.get("tool_calls")
    return _normal(str(message["content"])) + (repr(calls).encode() if calls else b"")


def _normal(text: str) -> bytes:
    return " ".join(text.casefold().split()).encode("utf-8", "surrogatepass")


def _hash(text: bytes) -> int:
    return xxhash.xxh3_64_intdigest(text)


def _minhash(texts: list[bytes]) -> Signatures:
    signatures = np.tile(_NO_SIGNATURE, (len(texts), 1))
    rows = [row for row, text in enumerate(texts) if len(text) >= MIN_SHINGLES + SHINGLE_BYTES - 1]
    if not rows:
        return signatures
    lengths = np.array([len(texts[row]) for row in rows], np.int64)
    joined = b"".join(texts[row] for row in rows)
    windows = len(joined) - SHINGLE_BYTES + 1
    hashes = np.ndarray((windows,), "<u8", joined, strides=(1,)).copy()
    hashes *= np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    owner = np.repeat(np.arange(len(rows), dtype=np.int64), lengths)[:windows]
    buckets = owner * BUCKETS + (hashes >> np.uint64(58)).astype(np.int64)
    values = (hashes >> np.uint64(24)).astype(np.uint32)
    inside = np.ones(windows, np.bool_)
    for end in np.cumsum(lengths)[:-1].tolist():  # shingles that extend into the next text
        inside[end - SHINGLE_BYTES + 1 : end] = False
    minima = np.full(len(rows) * BUCKETS, EMPTY, np.uint32)
    np.minimum.at(minima, buckets[inside], values[inside])
    signatures[rows] = minima.reshape(len(rows), BUCKETS)
    return signatures
