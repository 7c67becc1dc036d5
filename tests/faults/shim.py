"""Builds `inject.c` once per process and gives a run the environment in which its rules apply."""

import atexit
import errno
import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tests.conftest import ROOT

SOURCE = Path(__file__).with_name("inject.c")
MOST_RULES = 32


@dataclass(frozen=True)
class Rule:
    """One rule of inject.c, which documents the fields. `effect` is the name of an errno, a number or an effect.

    `on` is part of a path below the scene, or a pattern; the rule applies while the fault is armed.
    """

    call: str
    on: str
    effect: str
    count: int | None = None
    """Of the matching calls, how many are hit; None: all"""
    skip: int = 0
    rank: str = ""
    """Only on this rank, or `agent`"""

    def text(self, trigger: Path) -> str:
        effect = str(getattr(errno, self.effect)) if hasattr(errno, self.effect) else self.effect
        call = f"{self.call}@{self.rank}" if self.rank else self.call
        # more than a run can make
        count = self.count if self.count is not None else 10**9
        return f"{call}:{self.on}:{effect}:{trigger}:{self.skip}+{count}"


class Shim:
    """The rules of one run. They apply while `armed`."""

    def __init__(self, folder: Path, rules: Sequence[Rule]) -> None:
        assert len(rules) <= MOST_RULES
        self.rules = list(rules)
        self._trigger, self._counts = folder / "armed", folder / "counts"
        self._counts.write_bytes(bytes(4 * MOST_RULES))
        self._trigger.touch()

    @property
    def environment(self) -> dict[str, str]:
        if not self.rules:
            return {}
        return {
            "LD_PRELOAD": str(library()),
            "INJECT": ";".join(rule.text(self._trigger) for rule in self.rules),
            "INJECT_COUNTS": str(self._counts),
        }

    def arm(self) -> None:
        self._trigger.touch()

    def disarm(self) -> None:
        self._trigger.unlink(missing_ok=True)

    def hits(self) -> list[int]:
        """How many calls each rule has hit so far."""
        seen = struct.unpack(f"{MOST_RULES}I", self._counts.read_bytes())
        limits = [rule.count if rule.count is not None else 10**9 for rule in self.rules]
        return [min(max(0, n - rule.skip), most) for n, rule, most in zip(seen, self.rules, limits, strict=False)]


@lru_cache(maxsize=1)
def library() -> Path:
    """Compile the shim into a folder of its own."""
    folder = tempfile.mkdtemp(prefix="faults-shim-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder) / "inject.so"
    compiler = os.environ.get("CC") or "cc"
    options = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *options, "-o", str(target), str(SOURCE), "-ldl"], check=True)
    return target


def with_plants(folder: Path, plant: Mapping[str, object]) -> dict[str, str]:
    """The environment in which every Python process loads `planted.py`; writes `sitecustomize.py` for it."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text("import tests.faults.planted\n")
    paths = [str(site), str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "FAULTS_PLANT": json.dumps({"folder": str(folder), **plant})}
