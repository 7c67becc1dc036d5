"""What identifies the records of a source: digests of its files, cached so that a start need not read them again.

A digest is cached by (path, size, mtime, ctime, inode): `rsync` and `cp -p` set mtime, but nothing sets ctime. A file
that changed within the last seconds is not cached: it could change again within one tick of the file system's clock.

A file may be written while a set is made from it. So states are compared before each shard is kept, and the bytes once
more at the end: no set is ever stored under the digest of other bytes.
"""

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_dist.config.schema import SourceConfig
from ft_dist.data.read.paths import MEGATRON_SUFFIX, UNKNOWN, is_mds, is_saved_dataset, local_path
from ft_dist.data.read.sources import local_files
from ft_dist.errors import DataError
from ft_dist.outside import parse_object

SETTLED_S = 3.0
MEMORY = "digests.json"
MOST_REMEMBERED = 10_000
READ_BYTES = 2**22


State = tuple[int, int, int, int]


class SourceChangedError(DataError):
    """What was read may be neither the old nor the new content of a source."""


@dataclass(frozen=True)
class Content:
    """What a source held when it was looked at: digests of its files' bytes, or a hub dataset's name and revision.

    Equal identities mean equal records.
    """

    source: SourceConfig
    identity: list[str]
    states: dict[Path, State]

    @classmethod
    def of(cls, source: SourceConfig, cache: Path) -> "Content":
        """Reads each file only once, at about a gigabyte per second. `cache` is the folder of cached digests."""
        files = _files(source)
        if files is None:
            return cls(source, _hub_identity(source), {})
        digests, states = _digests(files, cache)
        return cls(source, [*_prefix(source), *digests], states)

    def check_states(self) -> None:
        """Raises SourceChangedError if a file was written since."""
        for file, state in self.states.items():
            try:
                now = _state(file)
            except OSError as error:
                raise _changed(file, f"it cannot be found any more: {error.strerror}") from None
            if now != state:
                raise _changed(file, "its size, time or inode")

    def check(self) -> None:
        """As `check_states`; the bytes are compared too: a clock that is too coarse may hide a change."""
        self.check_states()
        if _files(self.source) is None:
            now = _hub_identity(self.source)
            if now != self.identity and UNKNOWN not in (now[-1], self.identity[-1]):
                raise _changed(self.source.path, f"its revision is {now[-1]}, it was {self.identity[-1]}")
            return
        if [*_prefix(self.source), *map(_digest, self.states)] != self.identity:
            raise _changed(self.source.path, "its bytes")
        self.check_states()


def _changed(what: object, how: str) -> SourceChangedError:
    return SourceChangedError(f"{what}: changed while it was read ({how}). Nothing was kept; run again once it rests.")


def _files(source: SourceConfig) -> list[Path] | None:
    """Every file of a source; None for a hub dataset."""
    files = local_files(source)
    if files is not None:
        return [part for file in files for part in _halves(file) if part.is_file()]
    folder = local_path(source.path)
    if not is_saved_dataset(folder) and not is_mds(folder):
        return None
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _prefix(source: SourceConfig) -> list[str]:
    """A folder that is one dataset may hold several splits."""
    return [source.split] if local_files(source) is None else []


def _hub_identity(source: SourceConfig) -> list[str]:
    from ft_dist.data.read.tables import hub_revision

    return [source.path, source.name or "", source.split, hub_revision(source)]


def _halves(file: Path) -> list[Path]:
    """A Megatron set is two files of the same name."""
    if file.suffix.lower() in (MEGATRON_SUFFIX, ".bin"):
        return [file.with_suffix(MEGATRON_SUFFIX), file.with_suffix(".bin")]
    return [file]


def _digests(files: list[Path], cache: Path) -> tuple[list[str], dict[Path, State]]:
    """The digest of each file, and its state before it was read."""
    known = _remembered(cache)
    fresh: dict[str, list[object]] = {}
    digests, states = [], {}
    for file in files:
        try:
            state = states[file] = _state(file)
            entry = known.get(str(file.resolve()))
            if isinstance(entry, list) and entry[:-1] == list(state):
                digests.append(str(entry[-1]))
                continue
            digest = _digest(file)
            settled = time.time_ns() - file.stat().st_ctime_ns > SETTLED_S * 1e9
            if settled and _state(file) == state:
                fresh[str(file.resolve())] = [*state, digest]
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}). Check its permissions and the disk.") from None
        digests.append(digest)
    if fresh:
        _remember(cache, fresh)
    return digests, states


def _state(file: Path) -> State:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(file.suffix.encode(), digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _remembered(cache: Path) -> dict[str, Any]:
    try:
        return parse_object((cache / MEMORY).read_bytes(), where=cache / MEMORY, error=DataError)
    except (OSError, DataError):
        return {}


def _remember(cache: Path, fresh: dict[str, list[object]]) -> None:
    """Several processes may write at the same time: the file is always complete, and a lost entry is only
    recomputed."""
    known = {**_remembered(cache), **fresh}
    newest = dict(list(known.items())[-MOST_REMEMBERED:])
    part = cache / f"{MEMORY}.tmp-{os.getpid()}"
    with contextlib.suppress(OSError):  # a full disk: the next start reads the files again
        part.write_text(json.dumps(newest), encoding="utf-8")
        part.replace(cache / MEMORY)
