"""Problems in readable data: duplicates, contradictions, and held-out samples in the training set.

Works on the sketches stored with a set, in bounded memory: equality among at most MOST_KEYS records (of more, a sample
by hash, so that equal records are kept or left out together), similarity among the first NEAR_SAMPLES.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ft_dist.data.encode.minhash import ANSWER, BUCKETS, EMPTY, KEYS, PROMPT, RECORD, WHOLE, Keys, Signatures
from ft_dist.data.store.arrays import map_arrays
from ft_dist.data.store.index import read_index
from ft_dist.data.store.writer import SKETCHES, ShardWriter, temporary_folder
from ft_dist.errors import DataError
from ft_dist.storage import open_storage

MOST_KEYS = 2**23
MOST_RECORDS = np.uint64(2**48)
NEAR_SAMPLES = 2**17
NEAR_SHARE = 0.9
"""Share of equal buckets at which two texts are reported as near duplicates"""
BAND_BUCKETS = 4
READ_BYTES = 2**22
BLOCK_KEYS = 2**20
BLOCK_PAIRS = 2**16
_QUANTILES = {"shortest": 1e-12, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
EXAMPLES = 5
SHOWN_SAMPLES = 3
SHOWN_TOKENS = 400

Pairs = npt.NDArray[np.int64]
Arrays = Iterable[npt.NDArray[Any]]


def source_report(writer: ShardWriter, tokenizer: Any) -> dict[str, Any]:
    """Lengths, duplicates and three samples of a written set: what `report.json` adds to the counts.

    Examples are pairs of record numbers, counted from 1 through the source.
    """
    keys, rate = _some_keys(writer.parts("keys"), writer.counts.records)
    signatures = _first_rows(writer.parts("signatures"), NEAR_SAMPLES)
    signed = _first_rows(writer.parts("keys"), len(signatures))
    return {
        "lengths": _lengths(writer.parts("lengths")),
        "duplicates": _duplicates(keys, rate),
        "near_duplicates": _near_duplicates(signed, signatures),
        "contradictions": _contradictions(keys, rate),
        "shown": [
            marked_runs(tokens[:SHOWN_TOKENS], mask[:SHOWN_TOKENS], tokenizer)
            for tokens, mask in writer.first_samples(SHOWN_SAMPLES)
        ],
    }


def leakage(train: Sequence[str], held_out: Sequence[str]) -> dict[str, Any]:
    """Held-out records whose prompt (or text, if none) is in the training set, or nearly equals a training record.

    Takes the places of the sets. Examples are [held-out set, its record, training set, its record], records from 1.
    """
    with ExitStack() as stack:
        asked = [stack.enter_context(_sketches(place)) for place in held_out]
        trained = [stack.enter_context(_sketches(place)) for place in train]
        both = [(a, one, b, other) for a, one in enumerate(asked) for b, other in enumerate(trained)]
        equal = [leak for sides in both for leak in _equal(*sides)]
        near = [leak for sides in both for leak in _near(*sides)]
        records = sum(len(one.keys) for one in asked)
    equal_pairs = {leak[:2] for leak in equal}
    near = [leak for leak in near if leak[:2] not in equal_pairs]
    return {
        "records": records,
        "equal": len(equal_pairs),
        "near": len({leak[:2] for leak in near}),
        "examples": [
            [held_out[a], record, train[b], other] for a, record, b, other in (*equal[:EXAMPLES], *near[:EXAMPLES])
        ],
    }


class _Sketches(NamedTuple):
    keys: Keys
    signatures: Signatures


@contextmanager
def _sketches(place: str) -> Iterator[_Sketches]:
    storage = open_storage(place)
    entry, digest = read_index(storage).sketches, hashlib.blake2b(digest_size=16)
    where = storage.url_of(SKETCHES)
    if entry is None or entry.file != SKETCHES:
        raise DataError(f"{where}: not in the set's index. Prepare the set again.")
    with temporary_folder() as folder:
        path = folder / SKETCHES
        if storage.local is None:
            storage.fetch(SKETCHES, path, digest=digest)
        else:
            path = storage.local / SKETCHES
            for start in range(0, entry.bytes, READ_BYTES):
                digest.update(storage.read_range(SKETCHES, start, min(start + READ_BYTES, entry.bytes)))
        if path.stat().st_size != entry.bytes or digest.hexdigest() != entry.checksum:
            raise DataError(f"{where}: damaged (its checksum is not the one in the index). Prepare the set again.")
        arrays = map_arrays(path, ("keys", "signatures"))
        keys, signatures = arrays["keys"], arrays["signatures"]
        shaped = not (len(keys) % KEYS or len(signatures) % BUCKETS) and len(signatures) // BUCKETS <= len(keys) // KEYS
        if (keys.dtype, signatures.dtype) != (np.uint64, np.uint32) or not shaped:
            raise DataError(f"{where}: damaged (its arrays have other shapes). Prepare the set again.")
        found = _Sketches(keys.reshape(-1, KEYS), signatures.reshape(-1, BUCKETS))
        if (found.keys[:, RECORD] >= MOST_RECORDS).any():
            raise DataError(f"{where}: damaged (a record's number is too large). Prepare the set again.")
        yield found


Leak = tuple[int, int, int, int]


def _equal(a: int, asked: _Sketches, b: int, trained: _Sketches) -> list[Leak]:
    subjects, numbers = _subjects(asked.keys[:MOST_KEYS]), asked.keys[:MOST_KEYS, RECORD]
    order = np.argsort(subjects, kind="stable")
    ordered = subjects[order]
    seen = np.zeros(len(ordered), np.int64)  # the first training record with that subject
    for start in range(0, len(trained.keys), BLOCK_KEYS):
        block = trained.keys[start : start + BLOCK_KEYS]
        theirs = _subjects(block)
        first, last = (np.searchsorted(ordered, theirs, side=side) for side in ("left", "right"))
        for row in np.flatnonzero(last > first).tolist():
            mine = seen[first[row] : last[row]]
            mine[mine == 0] = int(block[row, RECORD])
    hits = np.flatnonzero(seen)
    pairs = sorted(zip(numbers[order[hits]].tolist(), seen[hits].tolist(), strict=True))
    return [(a, record, b, other) for record, other in pairs]


def _near(a: int, asked: _Sketches, b: int, trained: _Sketches) -> list[Leak]:
    count = len(trained.signatures)
    pairs = _alike(np.concatenate([trained.signatures, asked.signatures]))
    pairs = pairs[(pairs[:, 0] >= count) & (pairs[:, 1] < count)]
    return [
        (a, int(asked.keys[later - count, RECORD]), b, int(trained.keys[first, RECORD]))
        for later, first in pairs.tolist()
    ]


def _subjects(keys: Keys) -> npt.NDArray[np.uint64]:
    return np.where(keys[:, PROMPT] == 0, keys[:, WHOLE], keys[:, PROMPT])


def _some_keys(parts: Arrays, records: int) -> tuple[Keys, int]:
    """The keys of one in `rate` records, selected by prompt (or text), so that comparable records stay together."""
    rate = -(-max(1, records) // MOST_KEYS)
    chosen = [part[_subjects(part) % np.uint64(rate) == 0] for part in (flat.reshape(-1, KEYS) for flat in parts)]
    return np.concatenate([np.zeros((0, KEYS), np.uint64), *chosen]), rate


def _first_rows(parts: Arrays, most: int) -> npt.NDArray[Any]:
    kept: list[npt.NDArray[Any]] = []
    for part in parts:
        kept.append(np.array(part[: most - sum(map(len, kept))]))
        if sum(map(len, kept)) >= most:
            break
    return np.concatenate(kept)


def _duplicates(keys: Keys, rate: int) -> dict[str, Any]:
    """Records that repeat an earlier text, ignoring case and spacing."""
    order = np.argsort(keys[:, WHOLE], kind="stable")
    ordered = keys[order]
    repeats = np.flatnonzero(ordered[1:, WHOLE] == ordered[:-1, WHOLE]) + 1
    examples = ordered[np.stack([repeats - 1, repeats], axis=1), RECORD][:EXAMPLES]
    return {"records": len(repeats) * rate, "examples": examples.astype(np.int64).tolist()}


def _contradictions(keys: Keys, rate: int) -> dict[str, Any]:
    """Prompts with more than one answer."""
    keys = keys[keys[:, PROMPT] != 0]
    ordered = keys[np.lexsort((keys[:, RECORD], keys[:, ANSWER], keys[:, PROMPT]))]
    same_prompt = ordered[1:, PROMPT] == ordered[:-1, PROMPT]
    changes = np.flatnonzero(same_prompt & (ordered[1:, ANSWER] != ordered[:-1, ANSWER])) + 1
    prompts = len(np.unique(ordered[changes, PROMPT]))
    examples = ordered[np.stack([changes - 1, changes], axis=1), RECORD][:EXAMPLES]
    return {"prompts": prompts * rate, "examples": np.sort(examples.astype(np.int64), axis=1).tolist()}


def _near_duplicates(keys: Keys, signatures: Signatures) -> dict[str, Any]:
    pairs = _alike(signatures)
    pairs = pairs[keys[pairs[:, 0], WHOLE] != keys[pairs[:, 1], WHOLE]]
    later = np.unique(pairs[:, 0], return_index=True)[1]
    examples = keys[pairs[later][:EXAMPLES][:, ::-1], RECORD].astype(np.int64)
    return {"records": len(later), "among": len(signatures), "examples": examples.tolist()}


def _alike(signatures: Signatures) -> Pairs:
    """(later, first) rows with an estimated similarity of at least NEAR_SHARE, each with the first of its bucket.

    Locality-sensitive hashing: rows that agree in a band of BAND_BUCKETS buckets are compared. At the threshold two
    rows agree in a given band with probability 0.9 ** 4 = 0.66, and in none of sixteen with 4e-8.
    """
    found = [np.zeros((0, 2), np.int64)]
    for start in range(0, BUCKETS, BAND_BUCKETS):
        band = signatures[:, start : start + BAND_BUCKETS]
        rows = np.flatnonzero((band != EMPTY).all(axis=1))
        order = np.lexsort(band[rows].T)  # stable: the first row of a run is the earliest
        ordered = band[rows[order]]
        new_run = np.ones(len(rows), np.bool_)
        new_run[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        first = rows[order[np.maximum.accumulate(np.where(new_run, np.arange(len(rows)), 0))]]
        found.append(np.stack([rows[order], first], axis=1)[~new_run])
    candidates = np.unique(np.concatenate(found), axis=0)
    likeness = [np.zeros(0)]
    for start in range(0, len(candidates), BLOCK_PAIRS):
        one, other = (signatures[candidates[start : start + BLOCK_PAIRS, side]] for side in (0, 1))
        filled = (one != EMPTY) | (other != EMPTY)
        likeness.append(((one == other) & filled).sum(axis=1) / filled.sum(axis=1))
    return candidates[np.concatenate(likeness) >= NEAR_SHARE]


def _lengths(parts: Arrays) -> dict[str, Any]:
    """Sample lengths in tokens: quantiles, and counts in doubling bins."""
    counts = np.zeros(1, np.int64)
    for part in parts:
        more = np.bincount(part.astype(np.int64), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    cumulative = np.cumsum(counts)
    total = int(cumulative[-1])
    quantiles = {name: int(np.searchsorted(cumulative, share * total)) for name, share in _QUANTILES.items()}
    bins = []
    edge = 8
    while edge // 2 < len(counts):
        samples = int(counts[edge // 2 + 1 if edge > 8 else 0 : edge + 1].sum())
        if samples:
            bins.append({"up_to": edge, "samples": samples})
        edge *= 2
    return {**quantiles, "bins": bins}


def marked_runs(tokens: npt.NDArray[Any], mask: npt.NDArray[np.bool_], tokenizer: Any) -> list[dict[str, Any]]:
    """The text of a sample as runs of labelled and unlabelled tokens."""
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(tokens)]
    return [
        {"learnt": bool(mask[start]), "text": tokenizer.decode(tokens[start:end].tolist())}
        for start, end in pairwise(edges)
    ]
