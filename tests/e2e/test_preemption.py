"""Real runs that are asked to stop, or that hang: they commit, exit with 75 or 76 in time, and resume exactly."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ft_dist.checkpoint.commit.format import commits
from ft_dist.preemption.stop import SAME_NOTICE_S
from tests.chaos.storm import workers_of
from tests.conftest import ROOT, SMALL_RUN, read_lines, start_cli
from tests.ports import free_port
from tests.preemption.metadata import MetadataServer

pytestmark = pytest.mark.faults

NOTICE_S = 30
"""The shortest notice of any cloud"""
# steps of seconds, so that a notice arrives during a step
LONG_STEPS = ["batch.global_rows=240", "optim.epochs=3", "optim.max_steps=3"]
# an evaluation of minutes after the first step
LONG_EVALUATION = [
    "data.eval=[emails/test.jsonl]",
    "evaluate.before=false",
    "evaluate.interval_steps=1",
    "evaluate.generate=true",
    "evaluate.max_new_tokens=400",
    "evaluate.max_samples=null",
    "evaluate.batch_rows=4",
]


@pytest.fixture
def metadata():
    with MetadataServer() as server:
        yield server


def start(folder: Path, *settings: str, nproc: int = 2, **environment: str) -> subprocess.Popen[str]:
    arguments = [*SMALL_RUN, *settings, f"output_dir={folder}"]
    return start_cli("train", *arguments, "--nproc", str(nproc), "--max-restarts", "0", **environment)


def listening_to(server: MetadataServer, cloud: str) -> list[str]:
    return [f"preemption.cloud={cloud}", f"preemption.endpoint={server.url}"]


def wait_until(process: subprocess.Popen[str], what: Callable[[], bool], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def happened(folder: Path, name: str) -> bool:
    events = folder / "events.jsonl"
    return events.exists() and f'"event": "{name}"' in events.read_text()


def end_of(process: subprocess.Popen[str], code: int, *, within_s: float = NOTICE_S) -> str:
    """Its output, after it exits with `code`."""
    out, err = process.communicate(timeout=within_s)
    assert process.returncode == code, out + err
    return out + err


def committed(folder: Path) -> int:
    """The newest commit, which must be the last recorded step and have the event preempted."""
    steps = [line["step"] for line in read_lines(folder / "metrics.jsonl")]
    newest = commits(folder / "checkpoints")[-1].step
    last = read_lines(folder / "events.jsonl")[-1]
    assert (last["event"], last["step"]) == ("preempted", newest)
    assert steps == list(range(1, newest + 1))
    return newest


def test_a_notice_in_the_first_step_commits_it_and_the_run_resumes(cli, metadata, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, *LONG_STEPS, *listening_to(metadata, "gcp"))
    wait_until(process, lambda: happened(folder, "start"))
    metadata.announce("gcp")
    assert "stopped by GCP preemption" in end_of(process, 75)
    # a step shorter than the polling interval of a second ends before the notice is seen
    assert committed(folder) in (1, 2)
    resumed = cli("train", *SMALL_RUN, *LONG_STEPS, f"output_dir={folder}", "--nproc", "1")
    assert resumed.returncode == 0, resumed.stderr
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [1, 2, 3]


def test_a_notice_in_an_evaluation_commits_the_step_before_it(metadata, tmp_path):
    folder = tmp_path / "run"
    log = folder / "logs" / "rank-0.log"
    # under ZeRO-3 every forward is a collective: all ranks must stop at the same one
    process = start(folder, *LONG_EVALUATION, *listening_to(metadata, "aws"), "engine.zero_stage=3")
    wait_until(process, lambda: log.exists() and "answered" in log.read_text())
    metadata.announce("aws")
    end_of(process, 75)
    assert committed(folder) == 1
    assert not happened(folder, "evaluated")


def test_two_notices_count_once_and_reach_every_rank_from_one(metadata, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, *LONG_STEPS, *listening_to(metadata, "azure"))
    # a rank that is asked before training has nothing to save and ends the others too: wait until rank 1 trains
    wait_until(process, lambda: happened(folder, "start") and (folder / "logs" / "rank-1-stacks.log").exists())
    time.sleep(0.5)
    metadata.announce("azure")
    os.kill(workers_of(process.pid)[1], signal.SIGTERM)
    end_of(process, 75)
    assert committed(folder) == 1


def test_a_signal_before_the_first_step_exits_immediately(metadata, tmp_path):
    folder = tmp_path / "run"
    before = ["data.eval=[emails/test.jsonl]", *LONG_EVALUATION[3:]]
    process = start(folder, *before)
    log = folder / "logs" / "rank-0.log"
    wait_until(process, lambda: log.exists() and "answered" in log.read_text())
    # signal one rank only: it has nothing to save, and the launcher ends the other
    os.kill(workers_of(process.pid)[1], signal.SIGTERM)
    end_of(process, 75)
    assert commits(folder / "checkpoints") == []


def test_a_signal_in_a_commit_finishes_it_and_a_second_keeps_the_commit_before(tmp_path):
    folder = tmp_path / "run"
    root = folder / "checkpoints"
    # several times the pause below, even on a fast machine
    longer = ["batch.global_rows=960", "optim.epochs=6", "optim.max_steps=3"]

    def signal_in_commit() -> "subprocess.Popen[str]":
        process = start(folder, *longer, "checkpoint.interval_steps=1")
        before = {step.name for step in root.glob("step-*")}
        wait_until(process, lambda: any(step.name not in before for step in root.glob("step-*")))
        process.send_signal(signal.SIGTERM)
        return process

    process = signal_in_commit()
    # the ranks agree to stop in the long step that follows; a second signal does not wait for it. Garbage collection
    # between these two steps may delay reading the first signal.
    time.sleep(SAME_NOTICE_S + 1)
    process.send_signal(signal.SIGTERM)
    end_of(process, 75, within_s=5)
    assert [commit.step for commit in commits(root)] == [1]
    end_of(signal_in_commit(), 75)
    assert committed(folder) == 3


def test_a_hang_ends_with_76_and_stacks_of_every_rank(cli, tmp_path):
    folder = tmp_path / "run"
    settings = ["engine.hang_timeout_s=4", "checkpoint.interval_steps=2", "optim.max_steps=20"]
    process = start(folder, *settings)
    wait_until(process, lambda: happened(folder, "saved"))
    os.kill(workers_of(process.pid)[1], signal.SIGSTOP)
    assert "made no progress; the stacks of all ranks are in" in end_of(process, 76)
    for rank in range(2):
        assert "step_until_done" in (folder / "logs" / f"rank-{rank}-stacks.log").read_text()
    assert happened(folder, "hung")
    resumed = cli("train", *SMALL_RUN, *settings, f"output_dir={folder}", "--nproc", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == list(range(1, 21))


def test_a_run_stops_before_the_time_limit_of_its_job(tmp_path):
    folder = tmp_path / "run"
    limit = str(int(time.time()) + 60)
    process = start(folder, "preemption.margin_s=60", nproc=1, SLURM_JOB_END_TIME=limit, SLURM_JOB_ID="77")
    out = end_of(process, 75, within_s=120)
    assert "the job's time limit is" in out
    assert "stopped by the job's time limit after step 1" in out
    assert committed(folder) == 1


def test_a_run_that_waits_for_data_commits_and_stops(tmp_path):
    folder = tmp_path / "run"
    never = tmp_path / "never"
    os.mkfifo(never)
    settings = [*SMALL_RUN, "engine.zero_stage=3", f"output_dir={folder}"]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.stuck_rank", str(never), *settings],
            cwd=ROOT,
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        metrics = folder / "metrics.jsonl"
        wait_until(ranks[0], lambda: metrics.exists() and metrics.read_text().count("\n") == 3)
        time.sleep(1)
        # rank 1 waits for data, rank 0 for rank 1; only rank 0 gets the signal
        ranks[0].send_signal(signal.SIGTERM)
        for rank in ranks:
            end_of(rank, 75)
    finally:
        for rank in ranks:
            rank.kill()
    assert committed(folder) == 3


def test_a_closed_terminal_commits_unless_the_run_was_started_to_ignore_it(tmp_path):
    folder = tmp_path / "run"
    log = folder / "logs" / "rank-0.log"
    process = start(folder, *LONG_STEPS, nproc=1)
    wait_until(process, lambda: log.exists() and "step 1/3" in log.read_text())
    process.send_signal(signal.SIGHUP)
    assert "stopped by SIGHUP after step" in end_of(process, 75)
    assert committed(folder) in (1, 2)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does, for the processes started from here
    try:
        process = start(folder, *LONG_STEPS, nproc=1)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until(process, lambda: "resumed from step" in log.read_text())
    process.send_signal(signal.SIGHUP)
    os.kill(workers_of(process.pid)[0], signal.SIGHUP)
    end_of(process, 0, within_s=120)


def test_a_run_that_was_suspended_continues(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "engine.hang_timeout_s=4", "checkpoint.interval_steps=2", "optim.max_steps=40")
    wait_until(process, lambda: happened(folder, "saved"))
    workers = workers_of(process.pid)
    for stopped in ([process.pid], [*workers, process.pid]):
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.5)
    end_of(process, 0, within_s=120)
    assert not happened(folder, "restarted")
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == list(range(1, 41))
