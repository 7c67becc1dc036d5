"""Look at the data before anything heavy is imported: seconds at most, and the first mistake is told with its line.

Imports neither torch, transformers, numpy nor `datasets`. Parquet, Arrow, saved and hub datasets are only looked for
here; their records are checked when they are prepared.
"""

import json
import time
from pathlib import Path

from ft_dist.config.schema import DataConfig, SourceConfig
from ft_dist.data.formats import read_samples
from ft_dist.data.sources import is_remote_set, is_table, local_files
from ft_dist.errors import DataError, MissingFileError
from ft_dist.storage import open_storage

MAX_RECORDS = 200_000
MAX_SECONDS = 5.0
REMOTE_SECONDS = 30.0
"""A store that does not answer for so long before training is told; once training, data.remote_wait_s counts"""


def check_sources(data: DataConfig) -> list[str]:
    """One fact a source for the console, training sources first.

    Looks at no more than MAX_RECORDS records or MAX_SECONDS seconds of each source; the fact says so.
    Raises DataError for a missing or empty file, broken lines, unknown or mixed formats, a sample without an assistant
    turn, roles out of order, null or empty content, and a remote set without an index.
    """
    kinds = (("train", data.train), ("eval", data.eval))
    return [f"{kind} {_check(source, data)}" for kind, sources in kinds for source in sources]


def _check(source: SourceConfig, data: DataConfig) -> str:
    if is_remote_set(source.path):
        return _check_remote(source.path, wait_s=min(data.remote_wait_s, REMOTE_SECONDS))
    files = local_files(source)
    if files is None:
        place = "saved dataset" if Path(source.path).expanduser().is_dir() else "hub dataset"
        return f"{source.path}: {place}, checked when it is prepared"
    if any(is_table(file) for file in files):
        return f"{source.path}: {_plural(len(files), 'table file')}, checked when prepared"
    started = time.monotonic()
    count, last, stopped = 0, None, False
    for sample in read_samples(source):
        count, last = count + 1, sample
        if count >= MAX_RECORDS or (count % 1000 == 0 and time.monotonic() - started > MAX_SECONDS):
            stopped = True
            break
    assert last is not None, "read_samples raises on an empty source"
    return f"{source.path}: format {last.format}, {count}{' or more' if stopped else ''} samples{_of(files)}"


def _check_remote(url: str, *, wait_s: float) -> str:
    storage = open_storage(url, wait_s=wait_s)
    try:
        index = json.loads(storage.read_bytes("index.json"))
        return f"{url}: prepared set, {index['samples']} samples in {_plural(len(index['shards']), 'shard')}"
    except MissingFileError:
        raise DataError(f"{url}: no index.json there, so it is not a prepared set. Check the URL.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{url}/index.json: damaged ({error}). Prepare the set again.") from None


def _of(files: list[Path]) -> str:
    return f" in {len(files)} files" if len(files) > 1 else ""


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
