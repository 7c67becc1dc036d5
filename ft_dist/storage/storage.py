"""Named files in object stores and local folders. `files.py` has the places.

A `Storage` is a folder: a local path, or a URL such as `s3://bucket/folder`, `gs://`, `az://`, `hf://`. The client
libraries find endpoints and credentials in the usual places (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, ...). Transient errors
are retried for up to `wait_s` seconds (`retry.py`); permanent ones fail immediately. Writes are atomic: readers see a
whole file or none.
"""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from ft_dist.errors import ConfigError, MissingFileError, StorageError
from ft_dist.outside import check_name, expand_home
from ft_dist.storage.files import CALL_TIMEOUT_S, PART_BYTES, Files, Folder, Objects
from ft_dist.storage.retry import LOCAL_WAIT_S, delay_s, is_transient

READ_BACK_BYTES = 16 * 2**20
"""Uploads up to this size are read back and compared; for larger ones only the size is compared"""
LOG_INTERVAL_S = 10.0
SHORTEST_TIMEOUT_S = 5.0
"""One call gets this long even if the caller waits for less"""

Log = Callable[[str], None]
Result = TypeVar("Result")


def is_url(path: str | Path) -> bool:
    """True if `path` is a URL of any kind, `file://` and hub datasets included. False for a plain path or a hub id."""
    return "://" in str(path)


def is_remote_folder(path: str) -> bool:
    """True if `path` is a folder in an object store or a hub repository, which `open_storage` reads over the network.

    False for a local path, for `file://` (a local folder) and for `hf://` URLs of a whole dataset, which `datasets`
    loads.
    """
    if path.startswith("hf://"):
        kind, *rest = path.removeprefix("hf://").strip("/").split("/")
        return kind == "datasets" and len(rest) > 2
    return is_url(path) and not path.startswith("file://")


def open_storage(
    place: str | Path, *, wait_s: float = 1800.0, limit: str | None = "data.remote_wait_s", log: Log | None = None
) -> "Storage":
    """Open the folder at a local path or URL. No request is sent yet.

    One request is retried for up to `wait_s` seconds; error messages name `limit`, the config key that sets this, if
    there is one. `log` receives a line when retries begin, at most every 10 s while they last, and when they end.
    Raises ConfigError for an unknown protocol, a driver that is not installed, or the home of an unknown user.
    """
    url = str(place)
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    timeout_s = max(SHORTEST_TIMEOUT_S, min(CALL_TIMEOUT_S, wait_s))
    if is_url(url):
        files: Files = Objects(url, timeout_s=timeout_s)
    else:  # a disk that keeps failing does not come back as a network does
        files, wait_s, limit = Folder(expand_home(url, error=ConfigError)), min(wait_s, LOCAL_WAIT_S), None
    return Storage(files, str(place).rstrip("/"), wait_s=wait_s, limit=limit, log=log)


class Digest(Protocol):
    """An incremental hash, such as those of `hashlib` and `xxhash`."""

    def update(self, data: bytes, /) -> None: ...


class Storage:
    """Named files below one folder. Names are relative and use `/`. Thread-safe.

    Every method raises StorageError (MissingFileError for a missing file) with the URL, the failure and the fix. A name
    that could leave the folder, such as `/x` or `a/../../x`, is refused: it may come from a file of somebody else.
    """

    def __init__(self, files: "Files", url: str, *, wait_s: float, limit: str | None, log: Log | None) -> None:
        self.url = url
        self.wait_s = wait_s
        self._files = files
        self._limit = limit
        self._log = log
        self._closed = threading.Event()
        self._logged_at = -LOG_INTERVAL_S
        self._lock = threading.Lock()
        self._random = random.Random()  # noqa: S311 - delays; independent of the global generator, which the run seeds

    @property
    def local(self) -> Path | None:
        """The folder, or None if it is not on this machine's file system."""
        return self._files.path if isinstance(self._files, Folder) else None

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def read_bytes(self, name: str) -> bytes:
        return self._retried("read", name, lambda: self._files.read(name))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes start .. end - 1. Raises StorageError if the file is shorter."""

        def read() -> bytes:
            content = self._files.read(name, start, end)
            if len(content) == end - start:
                return content
            size = self._files.size(name)
            if size < end:
                raise _Refused(f"it has {size} bytes, fewer than {end}")
            raise ConnectionError(f"received {len(content)} of {end - start} bytes")

        return self._retried("read", name, read) if end > start else b""

    def fetch(self, name: str, to: Path, *, digest: Digest | None = None) -> None:
        """Copy a file to local disk, synced and atomic. A broken connection costs at most one ranged read.

        `digest` receives every byte once, in order.
        """
        size = self.size(name)
        part = to.with_name(f".{to.name}.part-{os.getpid()}-{threading.get_ident()}")
        try:
            with part.open("wb") as file:
                for start in range(0, size, PART_BYTES):
                    content = self.read_range(name, start, min(start + PART_BYTES, size))
                    file.write(content)
                    if digest is not None:
                        digest.update(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(to)
        except OSError as error:
            raise StorageError(f"{to}: cannot write ({error.strerror}). Free space or use another disk.") from None
        finally:
            part.unlink(missing_ok=True)

    def write(self, name: str, content: bytes | Path) -> None:
        """Write bytes or a local file under a name, replacing any earlier file; verified before this returns."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size

        def write() -> None:
            self._files.write(name, content)
            found = self._files.size(name)
            if found != size:
                raise ConnectionError(f"the store has {found} of {size} bytes")
            if self.local is None and size <= READ_BACK_BYTES:
                expected = content if isinstance(content, bytes) else content.read_bytes()
                if self._files.read(name) != expected:
                    raise ConnectionError("the bytes read back differ from those sent")

        self._retried("write", name, write)

    def list(self, folder: str = "") -> list[str]:
        """Sorted names of all files below a folder; empty if it does not exist."""
        return sorted(self._retried("list", folder, lambda: self._files.names(folder)))

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except MissingFileError:
            return False
        return True

    def size(self, name: str) -> int:
        """Size of a file in bytes."""
        return self._retried("read", name, lambda: self._files.size(name))

    def delete(self, name: str) -> None:
        """Remove a file, if it exists."""
        with contextlib.suppress(MissingFileError):
            self._retried("delete", name, lambda: self._files.delete(name))

    def close(self) -> None:
        """Cancel retries in other threads: they raise StorageError."""
        self._closed.set()

    def _retried(self, what: str, name: str, call: Callable[[], Result]) -> Result:
        if name or what != "list":
            check_name(name, where=self.url, error=StorageError)
        started, attempts, logged = time.monotonic(), 0, False
        while True:
            attempts += 1
            try:
                result = call()
            except Exception as error:
                if not is_transient(error):
                    raise self._final(what, name, error) from None
                logged |= self._wait(what, name, error, attempts, started)
                continue
            if logged and self._log:
                self._log(f"{self.url}: answers again after {time.monotonic() - started:.0f} s")
            return result

    def _wait(self, what: str, name: str, error: Exception, attempts: int, started: float) -> bool:
        """Sleep before the next attempt; returns whether it was logged. Raises StorageError at the limit."""
        waited = time.monotonic() - started
        url = self.url_of(name)
        if waited >= self.wait_s:
            otherwise = f", or raise {self._limit} ({self.wait_s:g})" if self._limit else ""
            raise StorageError(
                f"{url}: cannot {what}: {attempts} attempts failed within {waited:.0f} s ({_short(error)}). "
                f"Check the endpoint and the network{otherwise}."
            ) from None
        with self._lock:
            now = time.monotonic()
            due = now - self._logged_at >= LOG_INTERVAL_S
            if due:
                self._logged_at = now
        if due and self._log:
            self._log(f"{url}: {what} failed ({_short(error)}); retrying for up to {self.wait_s - waited:.0f} s more")
        if self._closed.wait(min(delay_s(attempts, self._random), self.wait_s - waited)):
            raise StorageError(f"{url}: {what} was cancelled because the storage was closed.")
        return due

    def _final(self, what: str, name: str, error: Exception) -> StorageError:
        url = self.url_of(name)
        if isinstance(error, FileNotFoundError):
            return MissingFileError(f"{url}: not found ({_short(error)}). Check the URL.")
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            return StorageError(
                f"{url}: not allowed to {what} ({_short(error)}). Check the credentials in the environment."
            )
        return StorageError(f"{url}: cannot {what} ({_short(error)}). Check the URL and its contents.")


class _Refused(Exception):  # noqa: N818 - an answer, not a failure of the store
    """The store answered; a retry would get the same answer."""


def _short(error: Exception) -> str:
    """The first line of an error, shortened to fit in a sentence."""
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[0]
    return text.rstrip(".") if len(text) <= 160 else text[:157] + "..."
