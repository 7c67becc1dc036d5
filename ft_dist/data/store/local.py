"""The files of a set in a local folder. Each is compared with its checksum before its first use.

Hashing runs at about a gigabyte per second, and a shard is hashed once per process, ahead of its first use where the
order of samples is known. So a run never trains on a flipped byte. While it trains, files that were rewritten are
hashed again.
"""

import hashlib
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ft_dist.data.store.index import FileEntry, SetIndex, read_index
from ft_dist.errors import DataError, MissingFileError, StorageError, UserError
from ft_dist.storage import Storage
from ft_dist.storage.file_digests import State, state_of
from ft_dist.storage.retry import patiently

READ_BYTES = 2**22
RECHECK_S = 20.0
"""Interval between looks at whether a file in use was rewritten"""


class LocalFolder:
    """`ShardFiles` of a local folder. Transient errors of a shared file system are retried (`Storage`)."""

    def __init__(self, storage: Storage) -> None:
        """Reads the index and compares the sizes of all files with it. Raises DataError, StorageError."""
        assert storage.local is not None, "a remote set goes through ShardCache"
        self.folder: Path = storage.local
        self.index: SetIndex = read_index(storage)
        self._storage = storage
        self._entries = {entry.file: entry for entry in self.index.files}
        self._intact: dict[str, State] = {}
        """Each file whose checksum this process has verified, as it was then"""
        self._locks = {file: threading.Lock() for file in self._entries}
        self._expected: list[str] = []
        self._damage: UserError | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        for entry in self.index.files:
            self._check_size(entry)

    def path(self, file: str) -> Path:
        path = self.folder / file
        with self._locks[file]:
            if file not in self._intact or self._is_rewritten(file):
                self._verify(self._entries[file])
        return path

    def expect(self, files: Sequence[str]) -> None:
        """Verify these ahead, in this order, on a thread; replaces the previous list."""
        with self._changed:
            self._expected = [file for file in files if file not in self._intact]
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._work, name="shard-verify", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def raise_if_damaged(self) -> None:
        if self._damage is not None:
            raise self._damage

    def forget(self) -> None:
        self._intact.clear()

    def close(self) -> None:
        self._storage.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=1)

    def _work(self) -> None:
        while not self._closed:
            with self._changed:
                ahead = self._expected.pop(0) if self._expected else None
                if ahead is None and not self._changed.wait(RECHECK_S) and not self._closed:
                    ahead = ""
            try:
                if ahead:
                    self.path(ahead)
                elif ahead == "":
                    self._recheck()
            except Exception as error:  # any: without this thread nobody would notice that a file is rewritten
                if not self._closed:
                    failure = StorageError(f"{self.folder}: cannot be verified ({error}).")
                    self._damage = error if isinstance(error, UserError) else failure
                return

    def _recheck(self) -> None:
        for file in list(self._intact):
            if self._is_rewritten(file):
                with self._locks[file]:
                    self._verify(self._entries[file])

    def _is_rewritten(self, file: str) -> bool:
        """False if it is gone: its maps stay valid, and whoever maps it next gets the error."""
        with suppress(OSError):
            return state_of(self.folder / file) != self._intact[file]
        return False

    def _check_size(self, entry: FileEntry) -> None:
        try:
            size = self._storage.size(entry.file)
        except MissingFileError:
            raise self._damaged(entry, "it is missing") from None
        if size != entry.bytes:
            raise self._damaged(entry, f"it has {size} bytes instead of {entry.bytes}")

    def _verify(self, entry: FileEntry) -> None:
        """Raises DataError if a byte differs from what was prepared, StorageError if the disk does not answer."""
        self._check_size(entry)
        digest = hashlib.blake2b(digest_size=16)
        state = self._state(entry)
        for start in range(0, entry.bytes, READ_BYTES):
            digest.update(self._storage.read_range(entry.file, start, min(start + READ_BYTES, entry.bytes)))
        if digest.hexdigest() != entry.checksum:
            raise self._damaged(entry, f"its checksum is {digest.hexdigest()} instead of {entry.checksum}")
        self._intact[entry.file] = state

    def _state(self, entry: FileEntry) -> State:
        path = self.folder / entry.file
        try:
            return patiently(lambda: state_of(path))
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror}). Run again when it can.") from None

    def _damaged(self, entry: FileEntry, how: str) -> DataError:
        return DataError(f"{self.folder / entry.file}: damaged ({how}). Delete {self.folder} and prepare it again.")
