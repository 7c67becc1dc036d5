"""Sets that exist already: of an earlier start, or named by the config."""

from typing import Any

from pydantic import Field

from ft_dist.data.encode.chunk import SourceCounts
from ft_dist.data.store.index import INDEX, REPORT, SetIndex, check_content, read_index
from ft_dist.errors import DataError, MissingFileError
from ft_dist.outside import Document, parse_object, validated
from ft_dist.storage import Storage

Pairs = list[tuple[int, int]]


class _Bin(Document):
    up_to: int
    samples: int = Field(gt=0)


class _Lengths(Document):
    shortest: int
    median: int
    p90: int
    p99: int
    longest: int
    bins: list[_Bin] = Field(min_length=1)


class _Repeats(Document):
    records: int
    examples: Pairs


class _Contradictions(Document):
    prompts: int
    examples: Pairs


class _Run(Document):
    learnt: bool
    text: str


class _Report(Document):
    counts: SourceCounts
    lengths: _Lengths
    duplicates: _Repeats
    near_duplicates: _Repeats
    contradictions: _Contradictions
    shown: list[list[_Run]]


def read_report(storage: Storage, index: SetIndex) -> dict[str, Any]:
    """The report of a set. Raises DataError if it is missing, damaged or about another set."""
    where = storage.url_of(REPORT)
    try:
        text = storage.read_bytes(REPORT)
    except MissingFileError:
        raise DataError(f"{where}: missing. Prepare the set again.") from None
    if index.report is not None:
        check_content(text, index.report, where=where)
    tree = parse_object(text, where=where, error=DataError)
    counts = validated(tree, _Report, where=where, error=DataError).counts
    totals = [sum(getattr(shard, name) for shard in index.shards) for name in ("samples", "tokens")]
    if [counts.samples, counts.tokens] != totals or not 0 <= counts.labelled_tokens <= counts.tokens:
        raise DataError(f"{where}: does not match {INDEX}. Prepare the set again.")
    return tree


def finished(storage: Storage) -> str | None:
    """The fingerprint of a complete set; "" if it is damaged, None if there is none. Reads no shard."""
    if not storage.exists(INDEX):
        return None
    try:
        index = read_index(storage)
        read_report(storage, index)
        entries = [*index.files, *([index.sketches] if index.sketches else [])]
        whole = all(storage.exists(entry.file) and storage.size(entry.file) == entry.bytes for entry in entries)
        return index.fingerprint if whole else ""
    except DataError:
        return ""
