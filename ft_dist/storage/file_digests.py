"""Digests of large files, remembered so that a start need not read them again.

A digest is remembered by (path, size, mtime, ctime, inode): `rsync` and `cp -p` set mtime, but nothing sets ctime. That
of a file that changed within the last seconds is not: it could change again within one tick of the file system's clock.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ft_dist.errors import StorageError
from ft_dist.outside import parse_object
from ft_dist.storage.retry import patiently

SETTLED_S = 3.0
MOST_REMEMBERED = 10_000
THREADS = 4
"""Hashing releases the interpreter's lock; one thread rarely keeps a fast disk busy"""


State = tuple[int, int, int, int]
"""Size, times of change of content and of inode (ns), and inode"""


def cached_digests(files: Sequence[Path], memory: Path, digest: Callable[[Path], str]) -> tuple[list[str], list[State]]:
    """The digest of each file, and its state before it was read; `memory` is the JSON file of remembered ones.

    Raises OSError for a file that cannot be read.
    """
    known = _remembered(memory)
    states = [state_of(file) for file in files]
    entries = [known.get(str(file.resolve()), []) for file in files]
    hits = [entry[:-1] == list(state) for entry, state in zip(entries, states, strict=True)]
    missing = [file for file, hit in zip(files, hits, strict=True) if not hit]
    computed = dict(zip(missing, digests_of(missing, digest), strict=True))
    fresh: dict[str, list[object]] = {}
    for file, state in zip(files, states, strict=True):
        settled = time.time_ns() - file.stat().st_ctime_ns > SETTLED_S * 1e9
        if file in computed and settled and state_of(file) == state:
            fresh[str(file.resolve())] = [*state, computed[file]]
    if fresh:
        _remember(memory, fresh)
    digests = [
        computed[file] if file in computed else str(entry[-1]) for file, entry in zip(files, entries, strict=True)
    ]
    return digests, states


def digests_of(files: Sequence[Path], digest: Callable[[Path], str]) -> list[str]:
    """Read now, several at a time. Raises OSError."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda file: patiently(lambda: digest(file)), files))


def state_of(file: Path) -> State:
    """Raises OSError."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _remembered(memory: Path) -> dict[str, list[object]]:
    with suppress(OSError, StorageError):
        known = parse_object(memory.read_bytes(), where=memory, error=StorageError)
        return {path: entry for path, entry in known.items() if isinstance(entry, list)}
    return {}


def _remember(memory: Path, fresh: dict[str, list[object]]) -> None:
    """Several processes may write at the same time: the file is always complete. Entries that are lost, because of that
    or of a full disk, are only recomputed."""
    newest = dict(list({**_remembered(memory), **fresh}.items())[-MOST_REMEMBERED:])
    part = memory.with_name(f"{memory.name}.tmp-{os.getpid()}")
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(newest), encoding="utf-8")
        part.replace(memory)
