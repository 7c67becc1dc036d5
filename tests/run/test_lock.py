"""One run at a time per output_dir, with real processes: a second run, kills, restarts, forked children."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ft_dist.errors import ConfigError
from ft_dist.run.lock import lock_folder, refuse_if_locked
from tests.chaos.storm import workers_of
from tests.conftest import ROOT, SMALL_RUN, read_lines, start_cli
from tests.ports import free_port

HOLD = """
import os, sys, time
from pathlib import Path
from ft_dist.run.lock import lock_folder
lock_folder(Path(sys.argv[1]), say=print)
if sys.argv[2:] == ["fork"] and os.fork() == 0:
    time.sleep(20)
print("locked", flush=True)
time.sleep(300)
"""
LONG = ["optim.max_steps=9999", "optim.epochs=9999", "evaluate.before=false"]


@pytest.fixture
def hold():
    """Start a process that holds the lock of a folder."""
    processes = []

    def start(folder: Path, *how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(folder), *how]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_run_is_refused_and_the_first_continues(cli, tmp_path):
    settings = [*SMALL_RUN, *LONG, f"output_dir={tmp_path / 'run'}"]
    with start_cli("train", *settings) as first:
        wait_for_steps(first, tmp_path / "run", 1)
        (rank,) = workers_of(first.pid)
        config = (tmp_path / "run" / "config.yaml").read_text()
        for second in (cli("train", *settings, "optim.lr=1e-3"), cli("check", *settings)):
            assert second.returncode == 2
            (line,) = second.stderr.strip().splitlines()
            assert line.startswith(f"ft-dist: error: output_dir={tmp_path / 'run'}: is in use by another run (")
            assert f", pid {rank}, since 2" in line
            assert line.endswith("). Wait for it, or choose another output_dir.")
        assert (tmp_path / "run" / "config.yaml").read_text() == config
        # a kill leaves the file, not the lock
        first.kill()
    short = [*SMALL_RUN, "optim.max_steps=2", f"output_dir={tmp_path / 'run'}"]
    done = cli("train", *short)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "run.lock").exists()


def test_restarted_workers_lock_the_folder_again(tmp_path):
    folder = tmp_path / "run"
    with start_cli("train", *SMALL_RUN, f"output_dir={folder}") as process:
        wait_for_steps(process, folder, 2)
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [event["event"] for event in read_lines(folder / "events.jsonl")].count("restarted") == 1


def test_every_rank_is_refused_and_none_writes(hold, tmp_path):
    hold(tmp_path / "run")
    before = sorted((tmp_path / "run").rglob("*"))
    port = str(free_port())
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "ft_dist.train", *SMALL_RUN, f"output_dir={tmp_path / 'run'}"]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | world | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert all("is in use by another run" in error for error in errors)
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_forked_child_that_outlives_the_run_holds_nothing(hold, tmp_path):
    holder = hold(tmp_path, "fork")
    holder.kill()
    holder.wait()
    refuse_if_locked(tmp_path, say=pytest.fail)


def test_a_run_that_is_ending_is_waited_for(hold, tmp_path):
    holder = hold(tmp_path)
    with subprocess.Popen(["/bin/sh", "-c", f"sleep 1; kill -9 {holder.pid}"]):
        refuse_if_locked(tmp_path, say=pytest.fail)


def test_a_lost_machine_gets_the_lease_of_a_file_server(hold, tmp_path, monkeypatch):
    holder = hold(tmp_path)
    monkeypatch.setattr("socket.gethostname", lambda: "another-host")
    monkeypatch.setattr("ft_dist.run.lock.OTHER_HOST_WAIT_S", 2.0)
    lines: list[str] = []
    with pytest.raises(ConfigError, match=f"in use by another run .*pid {holder.pid}"):
        refuse_if_locked(tmp_path, say=lines.append)
    (line,) = lines
    assert "waiting up to 2 s for the lock" in line


def test_a_file_system_without_locks_is_reported_in_one_line(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    lines: list[str] = []
    lock_folder(tmp_path / "run", say=lines.append)
    (line,) = lines
    assert "its file system has no locks (No locks available)" in line
