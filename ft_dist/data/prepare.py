"""Tokenise the sources once, keep the result under its fingerprint, and find it again.

The fingerprint covers a source's bytes (path, split and revision for a hub dataset), the tokenizer with its chat
template, and the options that shape samples. One process a node tokenises under a file lock; the others wait for the
lock, outside of any process group and its timeout, and then open what is there.

A sample over `max_length` tokens follows `data.too_long`; plain text is instead split into consecutive blocks of
`max_length` that overlap by one token, so that every token but the document's first is predicted exactly once.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from ft_dist.config.schema import DataConfig, SourceConfig
from ft_dist.data.formats import Sample, read_samples
from ft_dist.data.shard_cache import open_store
from ft_dist.data.sources import is_remote_set, is_saved_dataset, local_files
from ft_dist.data.store import INDEX, JoinedStore, StoreWriter, TokenStore
from ft_dist.data.template import Encoded, Encoder, tokenizer_identity
from ft_dist.errors import DataError

ENCODING_VERSION = 1
"""Part of every fingerprint: raised when the same input would give other tokens or masks."""

CHUNK_SAMPLES = 512
Progress = Callable[[int, int], None]
"""(samples done, tokens written) of all sources so far"""


@dataclass(slots=True)
class SourceCounts:
    """What became of one source's records."""

    name: str
    format: str = ""
    records: int = 0
    samples: int = 0
    """Samples in the store; more than the records where long text was split"""
    tokens: int = 0
    labelled_tokens: int = 0
    dropped_too_long: int = 0
    truncated: int = 0
    dropped_no_label: int = 0
    split_texts: int = 0
    turns_rewritten: int = 0
    end_token_added: int = 0
    system_folded: int = 0
    longest: int = 0
    """Tokens of the longest record before anything was cut"""


@dataclass(slots=True)
class Prepared:
    """The stores of the sources in their order, with their weights and counts."""

    stores: list[TokenStore]
    weights: list[float]
    counts: list[SourceCounts]
    reused: list[bool]
    """Whether each was found in the cache"""

    def add(self, store: TokenStore, source: SourceConfig, *, reused: bool) -> None:
        self.stores.append(store)
        self.weights.append(source.weight)
        self.counts.append(SourceCounts(**{**store.index["report"], "name": source.path}))
        self.reused.append(reused)

    @property
    def store(self) -> JoinedStore:
        """All sources as one."""
        return JoinedStore(self.stores)

    @property
    def weighted(self) -> list[tuple[TokenStore, float]]:
        """What `DataStream` takes."""
        return list(zip(self.stores, self.weights, strict=True))

    @property
    def report(self) -> dict[str, Any]:
        """Totals and one entry a source, ready for JSON."""
        per_source = [asdict(counts) for counts in self.counts]
        names = [field.name for field in fields(SourceCounts) if field.type in (int, "int") and field.name != "longest"]
        totals: dict[str, Any] = {name: sum(entry[name] for entry in per_source) for name in names}
        totals["longest"] = max((entry["longest"] for entry in per_source), default=0)
        totals["bytes"] = sum(store.nbytes for store in self.stores)
        return {**totals, "sources": per_source}


def prepare(
    sources: Sequence[SourceConfig],
    tokenizer: Any,
    *,
    data: DataConfig,
    model_path: str,
    progress: Progress | None = None,
) -> Prepared:
    """Token stores of all sources, tokenised now or found in the cache.

    Safe to call from every process at once. Raises DataError for what is wrong with the data (file, line and fix), or
    when no sample is left to learn from.
    """
    identity = tokenizer_identity(tokenizer)
    folder = cache_folder(data)
    prepared = Prepared([], [], [], [])
    for source in sources:
        if is_remote_set(source.path):
            store = open_store(
                source.path,
                cache=folder / "remote",
                cache_bytes=data.cache_bytes,
                wait_s=data.remote_wait_s,
                tell=lambda line: print(f"note: {line}", flush=True),
            )
            prepared.add(store, source, reused=True)
            continue
        fingerprint = _fingerprint(source, identity, data)
        done_before = (sum(counts.records for counts in prepared.counts), sum(c.tokens for c in prepared.counts))
        step = None if progress is None else _shifted(progress, *done_before)
        store, reused = _find_or_build(folder / fingerprint, source, tokenizer, data, model_path, step)
        prepared.add(store, source, reused=reused)
    return prepared


def cache_folder(data: DataConfig) -> Path:
    """Where prepared data lives: data.cache_dir, $FT_DIST_CACHE or ~/.cache/ft_dist."""
    root = data.cache_dir or os.environ.get("FT_DIST_CACHE") or "~/.cache/ft_dist"
    folder = Path(root).expanduser() / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be created ({error.strerror}). Set data.cache_dir to a writable folder."
        ) from None
    if not os.access(folder, os.W_OK):
        raise DataError(f"{folder}: not writable. Set data.cache_dir to a folder that is.")
    return folder


def _find_or_build(
    folder: Path, source: SourceConfig, tokenizer: Any, data: DataConfig, model_path: str, progress: Progress | None
) -> tuple[TokenStore, bool]:
    found = _open_if_whole(folder)
    if found is not None:
        return found, True
    with FileLock(folder.with_suffix(".lock")):
        found = _open_if_whole(folder)  # another process may have built it while this one waited
        if found is not None:
            return found, True
        for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        vocabulary = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
        writer = StoreWriter(folder, vocabulary=vocabulary, fingerprint=folder.name)
        try:
            counts = _tokenise(source, tokenizer, data, model_path, writer, progress)
            writer.commit(asdict(counts))
        except BaseException:
            writer.abort()
            raise
    return TokenStore.open(folder), False


def _open_if_whole(folder: Path) -> TokenStore | None:
    if not (folder / INDEX).is_file():
        return None
    try:
        return TokenStore.open(folder)
    except DataError:
        return None


def _tokenise(
    source: SourceConfig,
    tokenizer: Any,
    data: DataConfig,
    model_path: str,
    writer: StoreWriter,
    progress: Progress | None,
) -> SourceCounts:
    counts = SourceCounts(source.path)
    encoder = Encoder(tokenizer)
    for samples, encoded in _encoded_chunks(source, encoder):
        counts.format = samples[0].format
        for sample, one in zip(samples, encoded, strict=True):
            for piece in _fit(sample, one, data, counts):
                writer.add(piece.tokens, piece.mask)
                counts.samples += 1
                counts.tokens += len(piece.tokens)
                counts.labelled_tokens += sum(piece.mask[1:])
        counts.records += len(samples)
        if progress is not None:
            progress(counts.records, counts.tokens)
    for name, count in encoder.notes.items():
        setattr(counts, name, count)
    _check_usable(counts, data, model_path)
    return counts


def _encoded_chunks(source: SourceConfig, encoder: Encoder) -> Iterator[tuple[list[Sample], list[Encoded]]]:
    """Chunks in order; one is tokenised on the tokenizer's threads while the next is read and rendered."""
    samples = read_samples(source)
    with ThreadPoolExecutor(1) as pool:
        pending = None
        while chunk := list(islice(samples, CHUNK_SAMPLES)):
            rendered = [encoder.render(sample) for sample in chunk]
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = (chunk, pool.submit(encoder.tokenise, rendered))
        if pending is not None:
            yield pending[0], pending[1].result()


def _fit(sample: Sample, encoded: Encoded, data: DataConfig, counts: SourceCounts) -> list[Encoded]:
    """The sample as it enters the store under `data.max_length`: whole, cut, in blocks, or not at all."""
    length, limit = len(encoded.tokens), data.max_length
    counts.longest = max(counts.longest, length)
    if length <= limit:
        pieces = [encoded]
    elif sample.text is not None:
        counts.split_texts += 1
        starts = range(0, length - 1, limit - 1)
        pieces = [Encoded(encoded.tokens[at : at + limit], encoded.mask[at : at + limit]) for at in starts]
    elif data.too_long == "error":
        raise DataError(
            f"{sample.where}: {length} tokens, but data.max_length={limit}. "
            "Raise it, shorten the sample, or set data.too_long to drop or truncate."
        )
    elif data.too_long == "drop":
        counts.dropped_too_long += 1
        return []
    else:
        pieces = [Encoded(encoded.tokens[:limit], encoded.mask[:limit])]
        counts.truncated += any(pieces[0].mask[1:])
    learnable = [piece for piece in pieces if any(piece.mask[1:])]
    counts.dropped_no_label += not learnable
    return learnable


def _check_usable(counts: SourceCounts, data: DataConfig, model_path: str) -> None:
    if counts.samples:
        return
    reasons = []
    if counts.dropped_too_long:
        reasons.append(
            f"{counts.dropped_too_long} over data.max_length={data.max_length} (longest: {counts.longest} tokens)"
        )
    if counts.dropped_no_label:
        reasons.append(f"{counts.dropped_no_label} without a token to learn")
    if counts.turns_rewritten:
        reasons.append(f"{counts.turns_rewritten} assistant turns rewritten by the chat template of {model_path}")
    raise DataError(
        f"{counts.name}: none of {counts.records} records can be used: {', '.join(reasons)}. "
        "Raise data.max_length, set data.too_long=truncate, or set model.chat_template."
    )


def _shifted(progress: Progress, records: int, tokens: int) -> Progress:
    return lambda more_records, more_tokens: progress(records + more_records, tokens + more_tokens)


def _fingerprint(source: SourceConfig, identity: str, data: DataConfig) -> str:
    options = {
        "version": ENCODING_VERSION,
        "max_length": data.max_length,
        "too_long": data.too_long,
        "format": source.format,
        "columns": source.columns,
        "content": _content(source),
    }
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(options, sort_keys=True).encode())
    digest.update(identity.encode())
    return digest.hexdigest()


def _content(source: SourceConfig) -> list[str]:
    """What identifies the records of a source: the bytes of its files, or a hub dataset's revision."""
    files = local_files(source)
    if files is None:
        saved = Path(source.path).expanduser()
        if not is_saved_dataset(saved):
            from ft_dist.data.tables import hub_revision

            return [source.path, source.name or "", source.split, hub_revision(source)]
        files = sorted(file for file in saved.rglob("*") if file.is_file())
        return [source.split, *(_file_digest(file) for file in files)]
    return [_file_digest(file) for file in files]


def _file_digest(file: Path) -> str:
    digest = hashlib.blake2b(file.suffix.encode(), digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()
