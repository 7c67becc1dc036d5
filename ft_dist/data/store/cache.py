"""A bounded cache of remote token sets on this node, shared by all processes of all runs on it.

    ROOT/<checksum of the set's index>/<file>             complete and intact once it has this name
                                      /<file>.lock        held by the process that fetches it; others wait
                                      /.<file>.arriving   reserves its full size during the download

Locks are `flock`s: a dead process releases them, and the next process that frees space deletes its partial files. The
least recently used file is evicted first. Two kinds are exempt: the file that a process requested last (it holds a
shared lock on it until its next request) and, while others can be evicted, files that a process expects. A mapped file
stays readable after eviction; its bytes are freed when the last map closes.

A store that fails or stalls is retried (`ft_dist.storage`) for at most `data.remote_wait_s`. Other ranks may be waiting
in a collective, so the timeout of collectives is longer by that much (`RunConfig.collective_timeout_s`).
"""

import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from filelock import FileLock, Timeout

from ft_dist.data.store.index import INDEX, FileEntry, read_index
from ft_dist.data.store.store import TokenStore
from ft_dist.errors import DataError, MissingFileError, StorageError
from ft_dist.storage import LOG_INTERVAL_S, Log, Storage, open_storage

FETCH_THREADS = 4
ATTEMPTS = 3
"""Downloads with a wrong checksum before the remote copy counts as damaged"""
SMALLEST_CACHE_FILES = 2
"""The cache must hold this many files of the largest size: one in use, one downloading"""
LOCK_POLL_S = 0.05


def open_store(place: str, *, cache: Path, cache_bytes: int, wait_s: float, log: Log | None = None) -> TokenStore:
    """The prepared set at a local path or URL; a remote one is read through `cache`, at most `cache_bytes` of it.

    Raises DataError if it is missing or incomplete, StorageError if the store does not answer within `wait_s` seconds.
    """
    storage = open_storage(place, wait_s=wait_s, log=log)
    if storage.local is not None:
        return TokenStore.open(storage)
    return TokenStore(ShardCache(storage, cache, cache_bytes=cache_bytes, log=log), place)


class ShardCache:
    """`ShardFiles` of a set in a `Storage`."""

    def __init__(self, storage: Storage, root: Path, *, cache_bytes: int, log: Log | None = None) -> None:
        """Reads the index. Raises DataError if there is none, or if `cache_bytes` is too small for its files."""
        self.storage = storage
        self.index = read_index(storage)
        self._entries = {entry.file: entry for entry in self.index.files}
        largest = max(entry.bytes for entry in self.index.files)
        if cache_bytes < SMALLEST_CACHE_FILES * largest:
            raise DataError(
                f"data.cache_bytes={cache_bytes} is less than {SMALLEST_CACHE_FILES} x the largest file of "
                f"{storage.url} ({SMALLEST_CACHE_FILES} * {largest}). Use at least {SMALLEST_CACHE_FILES * largest}."
            )
        self.root = root
        self.folder = root / hashlib.blake2b(self.index.model_dump_json().encode(), digest_size=16).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._cache_bytes = cache_bytes
        self._log = log or (lambda line: None)
        self._intact: dict[str, tuple[int, int]] = {}
        """Inode and bytes of each file whose checksum this process has verified"""
        self._leases: dict[int, int] = {}
        """Thread -> open file under a shared lock: the one it requested last"""
        self._changed = threading.Condition()
        self._running: dict[str, Future[None]] = {}
        self._expected: list[str] = []
        self._ahead: set[str] = set()
        """Fetched ahead and not requested yet"""
        self._threads: list[threading.Thread] = []
        self._closed = False

    def path(self, file: str) -> Path:
        """The path of a complete, intact file; waits for it. The file stays until this thread requests the next one.

        Raises DataError if the file is missing or damaged in the store, StorageError when the wait limit is reached.
        """
        path = self.folder / file
        with self._changed:
            previous = self._leases.pop(threading.get_ident(), None)
        if previous is not None:
            os.close(previous)
        while not self._lease(path):
            self._obtain(file)
        with self._changed:
            self._ahead.discard(file)
            if file in self._expected:
                self._expected.remove(file)  # once used it has no priority over the files that come after it
            self._changed.notify_all()
        return path

    def expect(self, files: Sequence[str]) -> None:
        """Fetch these ahead, in this order, up to half of the cache; replaces the previous list."""
        with self._changed:
            self._expected = list(files)
            self._ahead.intersection_update(files)
            if not self._threads and not self._closed:
                self._threads = [
                    threading.Thread(target=self._fetch_ahead, name=f"shard-fetch-{number}", daemon=True)
                    for number in range(FETCH_THREADS)
                ]
                for thread in self._threads:
                    thread.start()
            self._changed.notify_all()

    def raise_if_damaged(self) -> None:
        """Every file was verified when it arrived, and the cache replaces files without rewriting them."""

    def forget(self) -> None:
        self._intact.clear()

    def close(self) -> None:
        """Stop every wait and download; the waiting threads raise StorageError."""
        self.storage.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for handle in self._leases.values():
                os.close(handle)
            self._leases.clear()
        for thread in self._threads:
            thread.join(timeout=1)

    def _lease(self, path: Path) -> bool:
        """Take a shared lock on a file that is present and known to be intact; False otherwise."""
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found = os.fstat(handle)
            leased = self._intact.get(path.name) == (found.st_ino, found.st_size) and os.path.samestat(
                found, os.stat(path)
            )
            if leased:
                os.utime(path)
        except (BlockingIOError, FileNotFoundError):  # it is being removed
            leased = False
        if not leased:
            os.close(handle)
            return False
        with self._changed:
            self._leases[threading.get_ident()] = handle
        return True

    def _obtain(self, file: str) -> None:
        """Make a file present and intact; one thread of this process fetches it, the others wait."""
        with self._changed:
            running = self._running.get(file)
            mine: Future[None] | None = None
            if running is None:
                mine = self._running[file] = Future()
        if mine is None:
            assert running is not None
            running.result()
            return
        try:
            self._fetch(self._entries[file])
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(None)
        finally:
            with self._changed:
                del self._running[file]

    def _fetch(self, entry: FileEntry) -> None:
        path = self.folder / entry.file
        with self._locked(path):
            if self._found_intact(path, entry):
                return
            arriving = _arriving(path)
            _remove_arriving(arriving)
            for attempt in range(1, ATTEMPTS + 1):
                self._make_room(arriving, entry.bytes)
                digest = hashlib.blake2b(digest_size=16)
                try:
                    self.storage.fetch(entry.file, arriving, digest=digest)
                    damage = _difference(arriving.stat().st_size, digest.hexdigest(), entry)
                    if damage is None:
                        found = arriving.stat()
                        self._intact[path.name] = (found.st_ino, found.st_size)
                        arriving.replace(path)
                        return
                except MissingFileError:
                    raise DataError(
                        f"{self.storage.url_of(entry.file)}: missing, though {INDEX} names it. "
                        "Upload it again, or prepare the set again."
                    ) from None
                finally:
                    arriving.unlink(missing_ok=True)
                if attempt < ATTEMPTS:
                    self._log(f"{self.storage.url_of(entry.file)}: arrived damaged ({damage}); retrying")
        raise DataError(
            f"{self.storage.url_of(entry.file)}: damaged in the store ({damage}, {ATTEMPTS} times). "
            "Upload it again, or prepare the set again."
        )

    def _found_intact(self, path: Path, entry: FileEntry) -> bool:
        """Whether the file is present and intact, checked once per process; a damaged one is removed."""
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                if self._intact.get(path.name) == (found.st_ino, found.st_size):
                    return True
                digest = hashlib.blake2b(digest_size=16)
                while block := file.read(2**22):
                    digest.update(block)
        except FileNotFoundError:
            return False
        damage = _difference(found.st_size, digest.hexdigest(), entry)
        if damage is None:
            self._intact[path.name] = (found.st_ino, found.st_size)
            return True
        self._log(f"{path}: damaged in the cache ({damage}); fetching another copy")
        path.unlink(missing_ok=True)
        return False

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Lock a file for fetching; while another process holds the lock, log that every 10 s."""
        lock = _lock(path)
        logged_at = time.monotonic()
        while True:
            if self._closed:
                raise StorageError(
                    f"{self.storage.url_of(path.name)}: the read was cancelled because the cache was closed."
                )
            try:
                lock.acquire(timeout=0.5, poll_interval=LOCK_POLL_S)
                break
            except Timeout:
                if time.monotonic() - logged_at >= LOG_INTERVAL_S:
                    logged_at = time.monotonic()
                    self._log(f"{self.storage.url_of(path.name)}: waiting for another process to fetch it")
        try:
            yield
        finally:
            lock.release()

    def _make_room(self, arriving: Path, size: int) -> None:
        """Evict the least recently used files until `size` more bytes fit, and reserve them."""
        with FileLock(self.root / ".room.lock", poll_interval=LOCK_POLL_S):
            _sweep(self.root)
            with self._changed:
                expected = {self.folder / file for file in self._expected}
            files = []
            for path in [*self.root.glob("*/*.safetensors"), *self.root.glob("*/.*.arriving")]:
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    files.append((path in expected, found.st_mtime_ns, found.st_size, path))
            over = sum(entry[2] for entry in files) + size - self._cache_bytes
            for _, _, freed, path in sorted(files):
                if over <= 0:
                    break
                if path.suffix == ".safetensors" and _remove_unless_leased(path):
                    over -= freed
            with arriving.open("wb") as file:
                file.truncate(size)

    def _fetch_ahead(self) -> None:
        while True:
            with self._changed:
                file = self._next_ahead()
                while file is None and not self._closed:
                    self._changed.wait()
                    file = self._next_ahead()
                if self._closed or file is None:
                    return
                self._ahead.add(file)
            # the thread that needs the file will get the error
            with contextlib.suppress(DataError, StorageError):
                self._obtain(file)

    def _next_ahead(self) -> str | None:
        """The first expected file that is neither present nor being fetched, within half of the cache."""
        ahead = sum(self._entries[file].bytes for file in self._ahead)
        for file in self._expected:
            if file in self._ahead or file in self._running:
                continue
            if file in self._intact and (self.folder / file).exists():
                continue
            fits = ahead + self._entries[file].bytes <= self._cache_bytes // 2
            return file if fits or not self._ahead else None
        return None


def _difference(size: int, checksum: str, entry: FileEntry) -> str | None:
    """How size or checksum differ from the index entry, or None."""
    if size != entry.bytes:
        return f"{size} bytes instead of {entry.bytes}"
    if checksum != entry.checksum:
        return f"checksum {checksum} instead of {entry.checksum}"
    return None


def _arriving(path: Path) -> Path:
    return path.with_name(f".{path.name}.arriving")


def _remove_arriving(arriving: Path) -> None:
    """Call it only while holding the file's lock."""
    for part in (arriving, *arriving.parent.glob(f".{arriving.name}.part-*")):
        part.unlink(missing_ok=True)


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(f"{path.name}.lock"))


def _remove_unless_leased(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def _sweep(root: Path) -> None:
    """Remove partial downloads of dead processes: those that no process has locked."""
    for arriving in root.glob("*/.*.arriving"):
        lock = _lock(arriving.with_name(arriving.name[1:].removesuffix(".arriving")))
        with contextlib.suppress(Timeout):
            lock.acquire(blocking=False)
            try:
                _remove_arriving(arriving)
            finally:
                lock.release()
