"""What identifies the records of a source: digests of its files, cached so that a start need not read them again.

A digest is cached by (path, size, mtime, ctime, inode): `rsync` and `cp -p` set mtime, but nothing sets ctime. A file
that changed within the last seconds is not cached: it could change again within one tick of the file system's clock.
"""

import hashlib
import json
import os
import time
from pathlib import Path

from ft_dist.config.schema import SourceConfig
from ft_dist.data.read.paths import MEGATRON_SUFFIX, is_mds, is_saved_dataset
from ft_dist.data.read.sources import local_files

SETTLED_S = 3.0
MEMORY = "digests.json"
MOST_REMEMBERED = 10_000
READ_BYTES = 2**22


def content_of(source: SourceConfig, cache: Path) -> list[str]:
    """Equal lists mean equal records: digests of the files' bytes, or a hub dataset's name and revision.

    Reads each file only once, at about a gigabyte per second. `cache` is the folder of cached digests.
    """
    files = local_files(source)
    if files is None:
        folder = Path(source.path).expanduser()
        if not is_saved_dataset(folder) and not is_mds(folder):
            from ft_dist.data.read.tables import hub_revision

            return [source.path, source.name or "", source.split, hub_revision(source)]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return [source.split, *_digests(files, cache)]
    return _digests([part for file in files for part in _halves(file) if part.is_file()], cache)


def _halves(file: Path) -> list[Path]:
    """A Megatron set is two files of the same name."""
    if file.suffix.lower() in (MEGATRON_SUFFIX, ".bin"):
        return [file.with_suffix(MEGATRON_SUFFIX), file.with_suffix(".bin")]
    return [file]


def _digests(files: list[Path], cache: Path) -> list[str]:
    known = _remembered(cache)
    fresh: dict[str, list[object]] = {}
    digests = []
    for file in files:
        state = _state(file)
        entry = known.get(str(file.resolve()))
        if entry is not None and entry[:-1] == state:
            digests.append(str(entry[-1]))
            continue
        digest = _digest(file)
        digests.append(digest)
        settled = time.time_ns() - file.stat().st_ctime_ns > SETTLED_S * 1e9
        if settled and _state(file) == state:
            fresh[str(file.resolve())] = [*state, digest]
    if fresh:
        _remember(cache, fresh)
    return digests


def _state(file: Path) -> list[object]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(file.suffix.encode(), digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _remembered(cache: Path) -> dict[str, list[object]]:
    try:
        known = json.loads((cache / MEMORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(cache: Path, fresh: dict[str, list[object]]) -> None:
    """Several processes may write at the same time: the file is always complete, and a lost entry is only
    recomputed."""
    known = {**_remembered(cache), **fresh}
    newest = dict(list(known.items())[-MOST_REMEMBERED:])
    part = cache / f"{MEMORY}.tmp-{os.getpid()}"
    part.write_text(json.dumps(newest), encoding="utf-8")
    part.replace(cache / MEMORY)
