"""Find every process of a run, grandchildren included, by a mark in its environment."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.conftest import read_lines


def marked(mark: str) -> list[int]:
    """Processes, except zombies, whose environment contains FT_DIST_TEST_RUN=MARK."""
    wanted = f"FT_DIST_TEST_RUN={mark}".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found


def wait_for(what: Callable[[], bool], processes: Sequence["subprocess.Popen[str]"], timeout_s: float = 900) -> None:
    """Wait until `what` is true; fail if one of `processes` ends before."""
    deadline = time.monotonic() + timeout_s
    while not what():
        for process in processes:
            assert process.poll() is None, (process.returncode, process.communicate())
        assert time.monotonic() < deadline, f"not reached in {timeout_s:g} s"
        time.sleep(0.02)


def steps_done(folder: Path) -> int:
    with suppress(OSError):
        return (folder / "metrics.jsonl").read_text().count("\n")
    return 0


def listening(port: int) -> bool:
    """True if a process of this machine listens on a TCP port."""
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port for fields in sockets)


def events_of(folder: Path, name: str) -> list[dict]:
    path = folder / "events.jsonl"
    return [event for event in read_lines(path) if event["event"] == name] if path.exists() else []


def end_all(mark: str) -> None:
    for pid in marked(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
