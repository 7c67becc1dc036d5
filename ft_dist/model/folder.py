"""Folders that are complete or absent: written to a sibling folder, synced to disk, renamed into place."""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `final` (absent or empty) when the block ends, and is removed if it raises.

    With `replace`, an earlier `final` is removed once the new one is complete.

    A kill at any moment leaves only the temporary folder, which the next call removes. Two processes must therefore not
    write the same `final` at the same time.
    """
    prefix = f".{final.name}-partial-"
    for stale in final.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    try:
        yield temporary
        _sync(temporary)
        if replace and final.exists():
            _replace(temporary, final, prefix)
        else:
            os.replace(temporary, final)
        _sync_one(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, final: Path, prefix: str) -> None:
    """An error leaves the earlier `final` in place."""
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    try:
        os.replace(final, aside / final.name)
        try:
            os.replace(temporary, final)
        except OSError:
            os.replace(aside / final.name, final)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(temporary: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for path in [*temporary.rglob("*"), temporary]:
        # temporary folders are private; the result gets the permissions of the user's umask
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
