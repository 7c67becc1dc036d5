"""Builds failing.c, and gives a process the environment in which one call fails while a file exists."""

import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

ENOSPC, EIO = 28, 5


class Failing:
    """`environment` for the process; the call fails from now until `end`."""

    def __init__(self, folder: Path, call: str, text: str, number: int = ENOSPC) -> None:
        self._file = folder / "failing"
        self._file.touch()
        self.environment = {"LD_PRELOAD": _library(), "FAILING": f"{call}:{text}:{number}:{self._file}"}

    def begin(self) -> None:
        self._file.touch()

    def end(self) -> None:
        self._file.unlink()


@lru_cache(maxsize=1)
def _library() -> str:
    built = Path(tempfile.mkdtemp()) / "failing.so"
    source = Path(__file__).with_name("failing.c")
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(built), str(source), "-ldl"], check=True)
    except FileNotFoundError:
        pytest.skip("needs gcc")
    return str(built)
