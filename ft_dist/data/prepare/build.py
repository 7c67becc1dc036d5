"""Tokenise each source once and store the result under its fingerprint, where later starts find it.

The fingerprint covers a source's bytes (path, split and revision for a hub dataset), the tokenizer with its chat
template, and the options that affect samples. One process per node tokenises under a file lock; the others wait for the
lock, outside any process group and its timeout, and then open the result. After an interruption the next start resumes
after the last finished shard (`store/writer.py`); the bytes are the same for any number of workers and interruptions.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import chain, islice
from typing import Any, NamedTuple

from filelock import FileLock

from ft_dist.config.schema import DataConfig, SourceConfig
from ft_dist.data.encode.chunk import COUNTED, ChunkEncoder, EncodedChunk, SourceCounts, why_unusable
from ft_dist.data.encode.template import tokenizer_identity
from ft_dist.data.encode.workers import available_cores, ordered_map
from ft_dist.data.prepare.digests import Content, SourceChangedError
from ft_dist.data.prepare.found import finished, read_report
from ft_dist.data.prepare.quality import NEAR_SAMPLES, source_report
from ft_dist.data.read.formats import format_of
from ft_dist.data.read.paths import CACHE_ADVICE, cache_folder, is_prepared_set
from ft_dist.data.read.sources import local_files, read_raw_records
from ft_dist.data.read.text_files import RawRecord, Record
from ft_dist.data.store.cache import open_store
from ft_dist.data.store.index import INDEX, read_index
from ft_dist.data.store.local import LocalFolder
from ft_dist.data.store.store import JoinedStore, TokenStore
from ft_dist.data.store.writer import ShardWriter
from ft_dist.data.stream.mixture import MixtureSource
from ft_dist.errors import DataError, UserError
from ft_dist.storage import Storage, open_storage

ENCODING_VERSION = 2
"""Part of every fingerprint: incremented when the same input would give other tokens or masks."""

CHUNK_RECORDS = 512
CHUNK_CHARACTERS = 2**20
CHUNKS_WITHOUT_WORKERS = 8
"""Starting workers takes seconds; up to this many chunks, this process alone finishes sooner"""


class Progress(NamedTuple):
    """Progress of preparing, over all sources so far."""

    records: int
    tokens: int
    share: float | None
    """Share of the current source's bytes that are processed; None if it is unknown"""


OnProgress = Callable[[Progress], None]
Raw = Record | RawRecord


@dataclass(slots=True)
class PreparedSet:
    """One source's set: its place and its report (`report.json`)."""

    name: str
    weight: float
    place: str
    report: dict[str, Any]
    reused: bool
    """Whether it existed before"""


@dataclass
class Prepared:
    """The sets of the sources, in order, and how to open one."""

    open_set: Callable[[str], TokenStore] = TokenStore.open
    sets: list[PreparedSet] = field(default_factory=list)

    @cached_property
    def stores(self) -> list[TokenStore]:
        return [self.open_set(one.place) for one in self.sets]

    @property
    def store(self) -> JoinedStore:
        """All sources as one store."""
        return JoinedStore(self.stores)

    @property
    def sources(self) -> list[MixtureSource]:
        """The sources as `DataStream` takes them."""
        return [MixtureSource(one.name, store, one.weight) for one, store in zip(self.sets, self.stores, strict=True)]

    @property
    def counts(self) -> list[SourceCounts]:
        return [SourceCounts(**{**one.report["counts"], "name": one.name}) for one in self.sets]

    @property
    def reused(self) -> list[bool]:
        return [one.reused for one in self.sets]

    @property
    def report(self) -> dict[str, Any]:
        """Totals and one entry per source, for JSON."""
        totals: dict[str, Any] = {name: sum(getattr(counts, name) for counts in self.counts) for name in COUNTED}
        totals["longest"] = max((counts.longest for counts in self.counts), default=0)
        return {**totals, "sources": [{"path": one.name, "place": one.place, **one.report} for one in self.sets]}


def prepare(
    sources: Sequence[SourceConfig],
    tokenizer: Any,
    *,
    data: DataConfig,
    model_path: str,
    to: str | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Prepared:
    """The token sets of all sources, tokenised now or found from an earlier start.

    They are stored in the cache folder, or at `to` followed by the source's number: a local path or a URL. A source
    that is already a prepared set is used unchanged. `workers` processes tokenise (None: one per core, and none for
    little data). Every process may call it at the same time. Raises DataError for errors in the data (file, line and
    fix), for a set made with another tokenizer or other options, or if no sample is left to train on.
    """
    made_with = rules_of(tokenizer, data)
    cache = cache_folder(data.cache_dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{cache}: cannot be created ({error.strerror}). {CACHE_ADVICE}") from None
    prepared = Prepared(
        partial(
            open_store,
            cache=cache / "remote",
            cache_bytes=data.cache_bytes,
            wait_s=data.remote_wait_s,
            log=_note,
        )
    )
    for number, source in enumerate(sources):
        if is_prepared_set(source.path):
            prepared.sets.append(taken_as_it_is(source, made_with, wait_s=data.remote_wait_s))
            continue
        content = Content.of(source, cache)
        fingerprint = _fingerprint(source, made_with, content)
        place = str(cache / fingerprint) if to is None else f"{to}-{number}"
        job = _Job(source, content, tokenizer, data, model_path, made_with, workers, _shifted(on_progress, prepared))
        with FileLock(cache / f"{hashlib.blake2b(place.encode(), digest_size=16).hexdigest()}.lock"):
            reused = _find_or_build(place, fingerprint, job, rebuild=to is None)
        storage = open_storage(place)
        report = read_report(storage, read_index(storage))
        prepared.sets.append(PreparedSet(source.path, source.weight, place, report, reused))
    return prepared


class _Job(NamedTuple):
    source: SourceConfig
    content: Content
    tokenizer: Any
    data: DataConfig
    model_path: str
    made_with: dict[str, Any]
    workers: int | None
    on_progress: OnProgress


def _note(line: str) -> None:
    """Logs during training, from any thread: to rank 0's console, or to another rank's log."""
    print(f"note: {line}", flush=True)


def rules_of(tokenizer: Any, data: DataConfig) -> dict[str, Any]:
    """What decides a set's tokens and masks, apart from the records."""
    return {
        "encoding": ENCODING_VERSION,
        **tokenizer_identity(tokenizer),
        "max_length": data.max_length,
        "too_long": data.too_long,
    }


def taken_as_it_is(
    source: SourceConfig, made_with: dict[str, Any], *, wait_s: float, limit: str = "data.remote_wait_s"
) -> PreparedSet:
    """A source that is a prepared set. Raises DataError unless it was made with the same rules."""
    storage = open_storage(source.path, wait_s=wait_s, limit=limit, log=_note)
    index = read_index(storage) if storage.local is None else LocalFolder(storage).index
    report, theirs = read_report(storage, index), index.made_with
    names = {"chat_template": "chat template", "encoding": "version of ft-dist"}
    for key, ours in made_with.items():
        if theirs.get(key) != ours:
            name = names.get(key, key if key == "tokenizer" else f"data.{key}")
            values = f" ({str(theirs.get(key))[:40]}, the config says {ours})" if name.startswith("data.") else ""
            raise DataError(
                f"{source.path}: prepared with a different {name}{values}. Prepare it again with ft-dist "
                "prepare, or restore the config it was prepared with."
            )
    return PreparedSet(source.path, source.weight, source.path, report, reused=True)


def _find_or_build(place: str, fingerprint: str, job: _Job, *, rebuild: bool) -> bool:
    """Build the set of this fingerprint unless it exists; return whether it existed."""
    storage = open_storage(place)
    found = finished(storage)
    if found == fingerprint:
        return True
    if found is not None and not rebuild:
        raise DataError(
            f"{place}: holds a set with other data, another tokenizer or other options. Delete it, or change --to."
        )
    if storage.local is not None and (storage.local / INDEX).exists():  # damaged
        shutil.rmtree(storage.local)
    try:
        _build(storage, fingerprint, job)
    except UserError:
        if rebuild and storage.local is not None:  # fixed data have another fingerprint, so nothing would resume this
            shutil.rmtree(storage.local, ignore_errors=True)
        raise
    return False


def _build(storage: Storage, fingerprint: str, job: _Job) -> None:
    raws = read_raw_records(job.source)
    first = next(raws)
    record_format = format_of(job.source, first.parse())
    encoder = ChunkEncoder.of(job.tokenizer, record_format, job.data)
    writer = ShardWriter(
        storage,
        fingerprint=fingerprint,
        made_with=job.made_with,
        dtype=encoder.dtype,
        before_shard=job.content.check_states,
    )
    writer.counts.format = record_format.format
    reading = _Reading(chain([first], raws), _bytes_of(job.source))
    jobs = reading.jobs(skip=writer.records)
    try:
        with closing(_encoded(encoder, jobs, job.workers)) as chunks:
            for chunk in chunks:
                writer.add(chunk)
                job.on_progress(Progress(writer.counts.records, writer.counts.tokens, reading.share_done()))
        writer.flush_rest()
        if not writer.counts.samples:
            why = why_unusable(writer.counts, job.data, model_path=job.model_path)
            raise DataError(f"{job.source.path}: {why}")
        report = {"counts": asdict(writer.counts), **source_report(writer, job.tokenizer)}
        job.content.check()
    except SourceChangedError:
        writer.discard()  # its shards may hold records of two versions of a file
        raise
    writer.commit(report)


class _Reading:
    """Splits records into jobs for a `ChunkEncoder` and tracks how much of the input is processed."""

    def __init__(self, raws: Iterator[Raw], total_bytes: int | None) -> None:
        self._raws = raws
        self._total = total_bytes
        self._done = 0
        self._sizes: deque[int] = deque()

    def share_done(self) -> float | None:
        """Called once per finished job, in order."""
        self._done += self._sizes.popleft()
        return min(1.0, self._done / self._total) if self._total else None

    def jobs(self, *, skip: int) -> Iterator[tuple[int, list[Raw], bool]]:
        """(number of the first record from 1, records, whether to sketch them); the same splits wherever it starts."""
        for raw in islice(self._raws, skip):
            self._done += _size(raw)
        number, chunk, size = skip + 1, [], 0
        for raw in self._raws:
            chunk.append(raw)
            size += _size(raw)
            if len(chunk) == CHUNK_RECORDS or size >= CHUNK_CHARACTERS:
                self._sizes.append(size)
                yield number, chunk, number <= NEAR_SAMPLES
                number, chunk, size = number + len(chunk), [], 0
        if chunk:
            self._sizes.append(size)
            yield number, chunk, number <= NEAR_SAMPLES


def _encoded(
    encoder: ChunkEncoder, jobs: Iterator[tuple[int, list[Raw], bool]], workers: int | None
) -> Generator[EncodedChunk, None, None]:
    """Encoded chunks in order: by this process first, then by `workers` if there is enough to do."""
    count = available_cores() if workers is None else workers
    # code from a model's repository cannot be sent to another process
    own_code = type(encoder.tokenizer).__module__.startswith("transformers_modules")
    alone = None if count == 1 or own_code else (CHUNKS_WITHOUT_WORKERS if workers is None else 0)
    for job in islice(jobs, alone):
        yield encoder(*job)
    first = next(jobs, None)
    if first is not None:
        yield from ordered_map(encoder, chain([first], jobs), workers=count)


def _size(raw: Raw) -> int:
    """Approximate characters: a chunk of long records must not hold hundreds of them in memory."""
    if isinstance(raw, RawRecord):
        return len(raw.line)
    return sum(_extent(value) for value in raw.fields.values())


def _extent(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_extent(inner) for inner in value.values())
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return sum(_extent(inner) for inner in value)
    return 8 * len(value) if isinstance(value, list) else int(getattr(value, "nbytes", 0)) or len(str(value))


def _bytes_of(source: SourceConfig) -> int | None:
    files = local_files(source)
    if files is None or any(
        file.suffix.lower() in (".gz", ".zst", ".parquet", ".arrow", ".idx", ".bin") for file in files
    ):
        return None
    return sum(file.stat().st_size for file in files)


def _shifted(on_progress: OnProgress | None, before: Prepared) -> OnProgress:
    """Counts continue from source to source."""
    records, tokens = (sum(getattr(counts, name) for counts in before.counts) for name in ("records", "tokens"))

    def shifted(now: Progress) -> None:
        if on_progress is not None:
            on_progress(Progress(records + now.records, tokens + now.tokens, now.share))

    return shifted


def _fingerprint(source: SourceConfig, made_with: dict[str, Any], content: Content) -> str:
    parts = {
        **made_with,
        "format": source.format,
        "columns": source.columns,
        "content": content.identity,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
