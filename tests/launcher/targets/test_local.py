"""Runs launched on this machine: status, logs, stop and resume by folder, and a second launch into an active run.

A shell script replaces the agent: it prints its arguments and exits with 75 on SIGTERM.
"""

import os
import time
from pathlib import Path

import pytest

from ft_dist.errors import UserError
from ft_dist.launcher.launch import plan_submission, resume, show_log, status, stop, submit, watch
from ft_dist.launcher.options import make_request
from ft_dist.launcher.record import read_record

AGENT = """#!/bin/bash
trap 'echo signalled; exit 75' TERM
echo "arguments: $*"
[ -e {folder}/finish ] && {{ echo '{{}}' >{run}/summary.json; exit 0; }}
while :; do sleep 0.05; done
"""


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run that has just been launched."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(AGENT.format(folder=tmp_path, run=tmp_path / "run"))
    python.chmod(0o755)
    profile = tmp_path / "machine.yaml"
    profile.write_text(f"venv: {tmp_path}/venv\n")
    submit(plan_submission(request(tmp_path, str(profile))))
    wait_for_log(tmp_path / "run", "arguments:")
    return tmp_path / "run"


def request(folder: Path, profile: str | None = None):
    return make_request(
        "smoke",
        [f"output_dir={folder}/run"],
        target="local",
        nodes="1",
        gpus_per_node=0,
        nproc=1,
        profile=profile,
        sweep=[],
        rdzv=None,
        max_restarts=2,
    )


def log(run: Path) -> str:
    shown: list[str] = []
    show_log(run, shown.append)
    return "".join(shown)


def wait_for_log(run: Path, text: str, times: int = 1) -> None:
    deadline = time.monotonic() + 60
    while log(run).count(text) < times:
        assert time.monotonic() < deadline, log(run)
        time.sleep(0.02)


def test_stop_signals_the_run_and_resume_restarts_it(run, tmp_path):
    assert status(run)["state"] == "running"
    assert f"--nnodes 1 --nproc 1 --max-restarts 2 {run}/launch/config.yaml" in log(run)
    with pytest.raises(UserError, match="is already active"):
        submit(plan_submission(request(tmp_path)))
    with pytest.raises(UserError, match="is already active"):
        resume(run)
    assert "committed and ended" in stop(run)
    assert "signalled" in log(run)
    assert status(run)["state"] == "stopped"
    with pytest.raises(UserError, match="nothing to stop"):
        stop(run)
    (tmp_path / "finish").touch()
    resume(run)
    said: list[str] = []
    shown: list[str] = []
    assert watch(run, say=said.append, show=shown.append) == 0
    assert said[-1] == "finished"
    assert "".join(shown).count("arguments:") == 2


def test_a_killed_run_is_failed_and_a_reused_pid_is_not_mistaken_for_it(run):
    pid = int(status(run)["job"].split("@")[0])
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert status(run)["state"] == "failed"
    # the PID may be reused: the start time distinguishes the processes
    record = (run / "launch.json").read_text()
    (run / "launch.json").write_text(record.replace(f"{pid}@", f"{os.getpid()}@"))
    assert status(run)["state"] == "failed"


def test_a_folder_without_a_launched_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no launch\.json, so no run was launched"):
        status(tmp_path)


def test_a_run_that_ended_before_its_start_time_was_read_is_inactive(run):
    stop(run)
    record = read_record(run)
    record.model_copy(update={"job": f"{record.job.partition('@')[0]}@"}).write(run)
    assert status(run)["state"] == "stopped"
