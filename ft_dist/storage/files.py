"""Where files are kept: a local folder, or an object store through fsspec. One attempt per call, no retries."""

import errno
import os
import threading
from pathlib import Path
from typing import Any, Protocol

from ft_dist.errors import ConfigError

PART_BYTES = 16 * 2**20
"""Bytes of one ranged read, the most that a broken connection wastes"""
CALL_TIMEOUT_S = 60.0
SLOWEST_BYTES_S = 2**18
"""A call that moves fewer bytes per second counts as stalled"""

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}


def _s3_options(timeout_s: float) -> dict[str, Any]:
    """One request is one attempt: Storage retries, so that every wait is logged."""
    return {
        "config_kwargs": {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": min(10.0, timeout_s),
            "read_timeout": timeout_s,
            # botocore's check fails for ranged reads from stores that answer with the checksum of the whole object; the
            # index of a token set holds its own checksums
            "response_checksum_validation": "when_required",
        }
    }


class Files(Protocol):
    """One attempt per call, no retries."""

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes: ...
    def write(self, name: str, content: bytes | Path) -> None: ...
    def names(self, folder: str) -> list[str]: ...
    def size(self, name: str) -> int: ...
    def delete(self, name: str) -> None: ...


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


class Folder:
    """A folder of this machine. A file is written under a temporary name, synced and renamed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        with (self.path / name).open("rb") as file:
            file.seek(start or 0)
            return file.read(-1 if end is None else end - (start or 0))

    def write(self, name: str, content: bytes | Path) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part-{os.getpid()}-{threading.get_ident()}")
        try:
            with part.open("wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with content.open("rb") as source:
                        while block := source.read(PART_BYTES):
                            file.write(block)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def names(self, folder: str) -> list[str]:
        """Raises OSError; Path.rglob would hide it, and a store that cannot be listed would look empty."""
        found = []
        for place, _, files in os.walk(self.path / folder, onerror=_unless_missing):
            found += [Path(place, name).relative_to(self.path).as_posix() for name in files if ".part-" not in name]
        return found

    def size(self, name: str) -> int:
        path = self.path / name
        if path.is_dir():
            raise FileNotFoundError(errno.ENOENT, "this is a folder")
        return path.stat().st_size

    def delete(self, name: str) -> None:
        (self.path / name).unlink()


class Objects:
    """Objects of a remote store through fsspec, without caches: another process may write.

    A call that moves no data fails after `timeout_s` seconds.
    """

    def __init__(self, url: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        protocol = url.partition("://")[0]
        import fsspec

        try:
            driver = fsspec.get_filesystem_class(protocol)
        except ValueError:
            raise ConfigError(
                f"{url}: unknown storage protocol {protocol}://. Use s3://, gs://, az:// or hf://."
            ) from None
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            fix = f"pip install 'ft-dist[{extra}]'" if extra else str(error)
            raise ConfigError(f"{url}: the driver for {protocol}:// is not installed. {fix}.") from None
        options = {
            "skip_instance_cache": True,
            "use_listings_cache": False,
            **(_s3_options(timeout_s) if protocol in ("s3", "s3a") else {}),
        }
        # a malformed endpoint or key only fails here
        try:
            self._files = driver(**options)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{url}: the driver for {protocol}:// rejects its settings ({error}). Correct them."
            ) from None
        if hasattr(self._files, "retries"):
            self._files.retries = (
                2  # one part of a large upload may fail once; Storage retries and logs longer failures
            )
        self._root = driver._strip_protocol(url).rstrip("/")

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        moved = PART_BYTES if start is None or end is None else end - start
        return bytes(self._files.cat_file(self._path(name), start=start, end=end, **self._timeout(moved)))

    def write(self, name: str, content: bytes | Path) -> None:
        if isinstance(content, bytes):
            self._files.pipe_file(self._path(name), content, **self._timeout(len(content)))
        else:
            size = content.stat().st_size
            self._files.put_file(str(content), self._path(name), **self._timeout(size))

    def names(self, folder: str) -> list[str]:
        start = self._path(folder) if folder else self._root
        self._files.invalidate_cache()
        found = self._files.find(start, **self._timeout(0))
        return [path[len(self._root) + 1 :] for path in found if path.startswith(f"{self._root}/")]

    def size(self, name: str) -> int:
        self._files.invalidate_cache()
        info = self._files.info(self._path(name), **self._timeout(0))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "this is a folder")
        return int(info["size"])

    def delete(self, name: str) -> None:
        self._files.rm_file(self._path(name), **self._timeout(0))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _timeout(self, moved_bytes: int) -> dict[str, float]:
        """The timeout of one call, for drivers that support one."""
        return {"timeout": self._timeout_s + moved_bytes / SLOWEST_BYTES_S} if self._files.async_impl else {}
