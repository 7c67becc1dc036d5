"""Check the data before anything heavy is imported: in seconds, and errors name their line.

Imports neither torch, transformers, numpy nor `datasets`. Parquet, Arrow, saved and hub datasets are only located
here; `prepare` checks their records.
"""

import time
from pathlib import Path

from pydantic import Field

from ft_dist.config.schema import DataConfig, SourceConfig
from ft_dist.data.read.formats import RecordFormat, format_of
from ft_dist.data.read.paths import INDEX, TEXT_SUFFIXES, cache_folder, is_mds, is_prepared_set, local_path, suffix_of
from ft_dist.data.read.sources import local_files, read_records
from ft_dist.data.read.text_files import Record
from ft_dist.errors import DataError, MissingFileError, counted
from ft_dist.outside import Document, parse_document
from ft_dist.storage import open_storage

MAX_RECORDS = 200_000
MAX_SECONDS = 5.0
MAX_FAULTS = 8
REMOTE_SECONDS = 15.0
"""How long a store may take to answer before training; during training data.remote_wait_s applies"""


def check_sources(data: DataConfig) -> list[str]:
    """One line per source for the console, training sources first.

    Reads at most MAX_RECORDS records or MAX_SECONDS seconds of each source; the line says so. Raises DataError for a
    missing or empty file, broken lines, unknown or mixed formats, a sample without an assistant turn, roles out of
    order, null or empty content: up to MAX_FAULTS records of a source in one message. Raises DataError for a remote set
    without an index or a cache that cannot be written, and StorageError for a store that does not answer.
    """
    cache_folder(data.cache_dir)
    kinds = (("train", data.train), ("eval", data.eval))
    return [f"{kind} {_check(source)}" for kind, sources in kinds for source in sources]


def _check(source: SourceConfig) -> str:
    if is_prepared_set(source.path):
        return f"{source.path}: prepared set, {counted(_samples_of(source.path), 'sample')}"
    files = local_files(source)
    if files is None:
        folder = local_path(source.path)
        place = "MDS folder" if is_mds(folder) else "saved dataset" if folder.is_dir() else "hub dataset"
        return f"{source.path}: {place}, checked when it is prepared"
    if any(suffix_of(file) not in TEXT_SUFFIXES for file in files):
        return f"{source.path}: {counted(len(files), 'table file')}, checked when prepared"
    record_format, count, stopped = _look_at(source)
    samples = f"{count:,} or more samples" if stopped else counted(count, "sample")
    return f"{source.path}: format {record_format.format}, {samples}{_of(files)}"


def _look_at(source: SourceConfig) -> tuple[RecordFormat, int, bool]:
    """(format, records read, whether more are left). An invalid record does not hide the next one."""
    started = time.monotonic()
    record_format: RecordFormat | None = None
    count, stopped = 0, False
    faults: list[str] = []
    try:
        for record in read_records(source):
            count += 1
            record_format = record_format or format_of(source, record)
            _note_fault(record_format, record, faults)
            late = count % 1000 == 0 and time.monotonic() - started > MAX_SECONDS
            if count >= MAX_RECORDS or late or len(faults) == MAX_FAULTS:
                stopped = True
                break
    except DataError as error:  # nothing after a broken line can be read
        faults.append(str(error))
    if faults:
        raise DataError(" ".join([*faults, "(and maybe more)" * (len(faults) == MAX_FAULTS)]).strip())
    assert record_format is not None, "read_records raises on an empty source"
    return record_format, count, stopped


def _note_fault(record_format: RecordFormat, record: Record, faults: list[str]) -> None:
    try:
        record_format.sample(record)
    except DataError as error:
        faults.append(str(error))


class _Index(Document):
    """What is said here about a prepared set; `ft_dist.data.store.index` has the rest."""

    samples: int = Field(gt=0)


def _samples_of(place: str) -> int:
    storage = open_storage(place, wait_s=REMOTE_SECONDS, limit="")
    try:
        text = storage.read_bytes(INDEX)
    except MissingFileError:
        raise DataError(f"{place}: no {INDEX} found, so it is not a prepared set. Check the URL.") from None
    return parse_document(text, _Index, where=storage.url_of(INDEX), error=DataError).samples


def _of(files: list[Path]) -> str:
    return f" in {len(files)} files" if len(files) > 1 else ""
