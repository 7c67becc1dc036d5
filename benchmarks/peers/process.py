"""Times one side's process: a timestamp for every line, memory of the whole process tree, a time limit."""

import os
import resource
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.case import Command

SAMPLE_S = 0.1
TAIL_S = 0.01
END_S = 5.0
"""A killed process that still exists after this long is stuck in the kernel"""
UNSET = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Unset, so that every side chooses its own threads"""

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "WANDB_MODE": "disabled",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True)
class Finished:
    """`lines` with the seconds since the start; `code` is None if the limit cut it off."""

    lines: list[tuple[float, str]]
    step_lines: list[tuple[float, str]]
    code: int | None
    peak_bytes: int
    seconds: float


def run(command: Command, *, folder: Path, limit_s: float) -> Finished:
    """Start the command, time its lines, end it."""
    environment = {key: value for key, value in os.environ.items() if key not in UNSET}
    environment |= OFFLINE | command.environment
    lines: list[tuple[float, str]] = []
    tailed: list[tuple[float, str]] = []
    started = time.perf_counter()
    with subprocess.Popen(
        command.arguments,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,  # a progress bar's carriage returns become line ends
        errors="replace",
        start_new_session=True,
    ) as process:
        watch = _Watch(process.pid)
        done = threading.Event()
        threads = [threading.Thread(target=_read, args=(process, lines, started), daemon=True)]
        threads.append(threading.Thread(target=watch.until, args=(done,), daemon=True))
        if command.steps_file:
            threads.append(
                threading.Thread(target=_tail, args=(command.steps_file, tailed, started, done), daemon=True)
            )
        for thread in threads:
            thread.start()
        try:
            code: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            watch.kill_all()
            done.set()
        for thread in threads:
            thread.join(timeout=10)
    steps = tailed if command.steps_file else lines
    (folder / "output.log").write_text("".join(f"{when:9.3f} {line}\n" for when, line in lines), encoding="utf-8")
    return Finished(lines, steps, code, watch.peak_bytes, time.perf_counter() - started)


def _read(process: "subprocess.Popen[str]", lines: list[tuple[float, str]], started: float) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append((time.perf_counter() - started, line.rstrip("\n")))


def _tail(path: Path, lines: list[tuple[float, str]], started: float, done: threading.Event) -> None:
    """Whole lines of a growing file, until the writer has ended."""
    kept = ""
    position = 0
    while True:
        last = done.is_set()
        if path.exists() and path.stat().st_size > position:
            with path.open(encoding="utf-8") as file:
                file.seek(position)
                kept += file.read()
                position = file.tell()
            *whole, kept = kept.split("\n")
            lines.extend((time.perf_counter() - started, line) for line in whole)
        if last:
            return
        time.sleep(TAIL_S)


class _Watch:
    """Resident memory of a process and its descendants, and how to end them."""

    def __init__(self, pid: int) -> None:
        self._root = pid
        self._seen = {pid}
        self.peak_bytes = 0

    def until(self, done: threading.Event) -> None:
        page = resource.getpagesize()
        while not done.wait(SAMPLE_S):
            tree = _tree(self._root)
            self._seen.update(tree)
            self.peak_bytes = max(self.peak_bytes, sum(_resident_pages(pid) for pid in tree) * page)

    def kill_all(self) -> None:
        """Kill what is left of the tree and wait until it has ended, which can take a while on a busy machine.

        A process id that was reused by a stranger is not in our session.
        """
        killed = []
        for pid in sorted(self._seen | set(_tree(self._root))):
            if pid != self._root and not _descends_or_orphaned(pid, self._seen):
                continue
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.append(pid)
        give_up = time.monotonic() + END_S
        while any(_runs(pid) for pid in killed) and time.monotonic() < give_up:
            time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Whether the process exists and has not ended; a zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _tree(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(below for child in children for below in _tree(int(child)))]


def _descends_or_orphaned(pid: int, ours: set[int]) -> bool:
    """Whether `pid` has one of our processes or init as its parent, and its session is one that we opened."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[3]) in ours


def _resident_pages(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
