"""Runs stages one after another, each in its own process group and within its own time limit.

A crash, a hang or a timeout costs only that stage. A stage writes its output straight to `log.txt` and its rows
straight to `results.jsonl`, without a pipe through this process, so nothing is lost even if it dies. Standard library
only.
"""

import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import Stage, limit_of
from benchmarks.rows import NOT_AVAILABLE, ROWS, STAGE, STARTED, append, tail

ROOT = Path(__file__).resolve().parents[2]
MARK = "FT_DIST_STAGE_MARK"
"""Set to a different value for every stage: identifies its processes, even those in other sessions"""
GRACE_S = 3.0
RESERVE_S = 5.0
DRY_PATIENCE = 5
"""A dry run may share its processor with other work, so a slow stage is not a finding"""
MAX_BYTES = 15 << 20
"""Result files are cut to this size"""


@dataclass
class Driver:
    """`out` receives results.jsonl and log.txt; `work` holds files that are not results."""

    out: Path
    work: Path
    total_s: float
    dry: bool = False
    site: Path | None = None
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.results, self.log = self.out / "results.jsonl", self.out / "log.txt"
        for path in (self.results, self.log):
            path.write_bytes(b"")
        for name in ("tmp", "triton", "inductor"):
            (self.work / name).mkdir(parents=True, exist_ok=True)

    def row(self, stage: str, kind: str, **fields: Any) -> None:
        append(self.results, {"stage": stage, "at_s": round(time.time() - self.started, 2), "kind": kind, **fields})

    def environment(self, stage: str, mark: str) -> dict[str, str]:
        """Offline, one GPU, every cache under `work`."""
        inherited = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", MARK)}
        inherited.pop("PYTHONDONTWRITEBYTECODE", None)  # without byte code every stage would compile 4,000 modules
        folders = [str(ROOT), str(ROOT / "kernels"), *([str(self.site)] if self.site else [])]
        gpu = "" if self.dry else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return inherited | {
            "PYTHONPATH": os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH", "")])),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "CUDA_VISIBLE_DEVICES": gpu,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TMPDIR": str(self.work / "tmp"),
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "FT_DIST_OUT": str(self.out),
            "FT_DIST_WORK": str(self.work),
            ROWS: str(self.results),
            STAGE: stage,
            STARTED: str(self.started),
            MARK: mark,
        }

    def left(self) -> float:
        return self.total_s - RESERVE_S - (time.time() - self.started)

    def run_all(self, stages: Sequence[Stage]) -> int:
        """The number of stages that failed or were cut."""
        bad = 0
        for number, stage in enumerate(stages):
            later = sum(other.seconds for other in stages[number + 1 :])
            outcome: dict[str, Any] = {"outcome": "cut", "why": "the script was stopped"}
            try:
                outcome = self.outcome_of(stage, later)
            finally:
                self.row(stage.name, "stage", budget_s=stage.seconds, **outcome)
            ended, seconds = outcome["outcome"], outcome.get("seconds", 0.0)
            say(f"{stage.name:16} {ended:14} {seconds:6.1f} s  {outcome.get('why', '')}".rstrip())
            bad += ended in ("failed", "cut", "skipped")
            cut_in_the_middle(self.log, MAX_BYTES)
        return bad

    def outcome_of(self, stage: Stage, later: float) -> dict[str, Any]:
        """`outcome`: done, failed, cut, skipped or not available, and why."""
        command = stage.dry if self.dry else stage.command
        if command is None:
            return {"outcome": "not available", "why": "needs a GPU"}
        if stage.needs and not self._importable(stage.needs):
            return {"outcome": "not available", "why": f"{stage.needs} is not installed"}
        left = self.left()
        limit = limit_of(stage.seconds, later=later, left=left)
        if limit is None:
            why = f"needs {stage.seconds:.0f} s, {max(0.0, left):.0f} s are left of {self.total_s:.0f} s"
            return {"outcome": "skipped", "why": why}
        if self.dry:
            limit = min(left, DRY_PATIENCE * stage.seconds)
        return self.run(stage, command, limit)

    def run(self, stage: Stage, arguments: Sequence[str], limit_s: float) -> dict[str, Any]:
        """Run one stage to its end or its limit, then end all its processes."""
        mark = secrets.token_hex(8)
        begin = self.log.stat().st_size
        command = [sys.executable, "-W", "ignore", "-m", *arguments]
        started = time.monotonic()
        with self.log.open("ab", buffering=0) as log:
            log.write(f"\n== {stage.name} ({limit_s:.0f} s): {' '.join(command)}\n".encode())
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment(stage.name, mark),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process, mark)
        seconds = round(time.monotonic() - started, 2)
        found: dict[str, Any] = {"seconds": seconds, "limit_s": round(limit_s, 1), "exit_code": code}
        if code == 0:
            return {"outcome": "done", **found}
        said = self._said_since(begin)
        if code == NOT_AVAILABLE:
            return {"outcome": "not available", **found, "why": said.splitlines()[-1] if said else ""}
        if code is None:
            return {"outcome": "cut", **found, "why": f"cut off after {limit_s:.0f} s", "tail": said}
        why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return {"outcome": "failed", **found, "why": why, "tail": said}

    def _said_since(self, begin: int) -> str:
        with self.log.open("rb") as file:
            file.seek(max(begin, self.log.stat().st_size - (64 << 10)))
            return tail(file.read().decode(errors="replace"))

    def _importable(self, package: str) -> bool:
        """Checked without importing it."""
        folders = [self.site] if self.site else []
        return any((folder / package).is_dir() for folder in folders) or importlib.util.find_spec(package) is not None


def say(line: str) -> None:
    print(line, flush=True)


def end(process: "subprocess.Popen[bytes]", mark: str) -> None:
    """End the group and whatever the stage started elsewhere; SIGTERM first, so that it can print its stacks."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + GRACE_S
    while (left := marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """Processes of this stage that still run, in any session (on Linux; elsewhere only the process group)."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def cut_in_the_middle(path: Path, most: int) -> None:
    """Keep the beginning and a larger part of the end."""
    size = path.stat().st_size
    if size <= most:
        return
    note = f"\n... {size - most} bytes and a little more were cut out here ...\n".encode()
    head = most // 3
    with path.open("rb") as file:
        first = file.read(head)
        file.seek(size - (most - head - len(note)))
        last = file.read()
    path.write_bytes(first + note + last)
