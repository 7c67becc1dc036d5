"""The workers of one machine end when their agent does, and their children end with them."""

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ft_dist.launcher.elastic.workers import Share, WorkerExit, Workers
from tests.conftest import ROOT
from tests.launcher.processes import end_all, marked, wait_for

AGENT = """
import sys, time
from ft_dist.launcher.elastic.workers import Share, Workers
workers = Workers([], module="tests.launcher.parent")
workers.start(Share(1, 0, 2, 2, 0, 1, "127.0.0.1", 1))
time.sleep(600)
"""


@pytest.fixture
def mark(monkeypatch):
    name = secrets.token_hex(8)
    monkeypatch.setenv("FT_DIST_TEST_RUN", name)
    yield name
    end_all(name)


def started(mark: str, what: bytes) -> list[int]:
    return [pid for pid in marked(mark) if what in Path(f"/proc/{pid}/cmdline").read_bytes()]


def gone(pids: list[int], within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_grandchildren_end_with_a_killed_agent(mark):
    agent = subprocess.Popen([sys.executable, "-c", AGENT], cwd=ROOT, text=True)
    wait_for(lambda: len(started(mark, b"sleep\x00600")) == 2, [agent], 60)
    left = marked(mark)
    assert len(left) == 6, "an agent, its guard, two workers and a child of each"
    agent.kill()
    agent.wait()
    assert gone(left)


def test_without_the_guard_the_workers_still_end(mark):
    agent = subprocess.Popen([sys.executable, "-c", AGENT], cwd=ROOT, text=True)
    wait_for(lambda: len(started(mark, b"sleep\x00600")) == 2, [agent], 60)
    (guard,) = started(mark, b"/bin/sh")
    os.kill(guard, signal.SIGKILL)
    workers = started(mark, b"tests.launcher.parent")
    agent.kill()
    agent.wait()
    assert gone(workers)


@pytest.fixture
def workers(mark):
    workers = Workers(["3"], module="tests.launcher.parent")
    yield workers
    workers.close()


def ends(workers: Workers, count: int) -> list[WorkerExit]:
    found: list[WorkerExit] = []
    deadline = time.monotonic() + 60
    while len(found) < count and time.monotonic() < deadline:
        found += workers.ended()
        time.sleep(0.01)
    return sorted(found, key=lambda worker: worker.rank)


def test_a_failed_worker_reports_its_exit_code_and_leaves_no_process(mark, workers):
    workers.start(Share(1, 4, 2, 6, 1, 2, "127.0.0.1", 1))
    assert ends(workers, 2) == [WorkerExit(4, 3), WorkerExit(5, 3)]
    assert gone(started(mark, b"sleep\x00600"))


def test_a_worker_signalled_before_it_installs_handlers_counts_as_preempted(mark, workers):
    workers._command = workers._command[:-1]
    workers.start(Share(1, 0, 2, 2, 0, 1, "127.0.0.1", 1))
    wait_for(lambda: len(started(mark, b"sleep\x00600")) == 2, [], 60)
    workers.signal(signal.SIGTERM)
    assert ends(workers, 2) == [WorkerExit(0, 75), WorkerExit(1, 75)]


def test_a_worker_killed_from_outside_and_one_stopped_by_the_agent(mark, workers):
    workers._command = workers._command[:-1]
    workers.start(Share(1, 0, 2, 2, 0, 1, "127.0.0.1", 1))
    wait_for(lambda: len(started(mark, b"sleep\x00600")) == 2, [], 60)
    os.kill(workers._running[1].pid, signal.SIGKILL)
    assert ends(workers, 1) == [WorkerExit(1, -9)]
    workers.stop()
    assert ends(workers, 1) == [WorkerExit(0, None)]
    assert not workers.running
    assert gone(started(mark, b"sleep\x00600"))
