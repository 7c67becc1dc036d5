"""What identifies the records of a source: digests of its files, which `cached_digests` remembers.

A file may be written while a set is made from it. So states are compared before each shard is kept, and the bytes once
more at the end: no set is ever stored under the digest of other bytes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ft_dist.config.schema import SourceConfig
from ft_dist.data.read.paths import MEGATRON_SUFFIX, UNKNOWN, is_mds, is_saved_dataset, local_path
from ft_dist.data.read.sources import local_files
from ft_dist.errors import DataError
from ft_dist.storage.file_digests import State, cached_digests, digests_of, state_of

MEMORY = "digests.json"
READ_BYTES = 2**22


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
                now = state_of(file)
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
        try:
            digests = digests_of(list(self.states), _digest)
        except OSError as error:
            raise _changed(self.source.path, f"it cannot be read any more: {error.strerror}") from None
        if [*_prefix(self.source), *digests] != self.identity:
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
    try:
        digests, states = cached_digests(files, cache / MEMORY, _digest)
    except OSError as error:
        where = error.filename or files[0]
        raise DataError(f"{where}: cannot be read ({error.strerror}). Check its permissions and the disk.") from None
    return digests, dict(zip(files, states, strict=True))


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(file.suffix.encode(), digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
