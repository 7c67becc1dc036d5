"""Signals stop a process in every phase, even if its main thread is blocked; SLURM gives the time limit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ft_dist.errors import ConfigError
from ft_dist.preemption.slurm import TimeLimit, job_ends_at
from ft_dist.preemption.stop import SAME_NOTICE_S
from tests.conftest import ROOT, SMALL_RUN
from tests.faults.shim import Rule, Shim

SCRIPT = """
import ctypes, os, signal, sys, time
from ft_dist.preemption.signals import listen
from ft_dist.preemption.stop import StopRequest
stop = StopRequest()
listen(stop)
"""
# one C call that runs no bytecode, like a collective or a read
BLOCKED = "libc = ctypes.CDLL(None); print('blocked', flush=True)\nwhile True: libc.pause()\n"


def start(body: str, *, before: str = "", **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", before + SCRIPT + body],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"RANK": "0"} | environment,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_before_training_a_signal_exits_immediately_even_from_a_blocked_call(number):
    process = start(BLOCKED)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 75
    assert number.name in err


def test_in_training_only_a_later_second_signal_exits():
    process = start("stop.training_started()\n" + BLOCKED)
    process.send_signal(signal.SIGTERM)
    # the same notice again, forwarded by the launcher
    process.send_signal(signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(SAME_NOTICE_S + 0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75


def test_a_signal_to_a_run_that_has_finished_changes_nothing(tmp_path):
    """Not even while the interpreter shuts down, which restores the default action of signals that have a handler."""
    script = (
        "import os, sys\n"
        "from ft_dist.train import main\n"
        "class Late:\n"
        "    def __del__(self, say=os.write, read=os.read): say(1, b'late\\n'), read(0, 1)\n"
        "late = Late()\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    run = [*SMALL_RUN, "optim.max_steps=1", f"output_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", script, *run]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert "late\n" in process.stdout
        for number in (signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
        process.communicate("x", timeout=60)
    assert process.returncode == 0


def test_a_closed_terminal_is_ignored_by_what_was_started_with_nohup():
    body = "print('ready', flush=True)\ntime.sleep(0.5)\nprint(stop.wanted, flush=True)\n"
    process = start(body, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=10)
    assert (out.strip(), process.returncode) == ("False", 0)


def test_the_loop_sees_the_first_signal_and_continues_until_it_has_committed():
    body = """
stop.training_started()
print("ready", flush=True)
while not stop.wanted: time.sleep(0.01)
print(stop.reason, flush=True)
stop.training_ended()
"""
    process = start(body)
    process.send_signal(signal.SIGUSR2)
    out, _ = process.communicate(timeout=10)
    assert (out.strip(), process.returncode) == ("SIGUSR2", 75)


def test_ending_a_forked_child_does_not_stop_its_parent():
    body = """
stop.training_started()
child = os.fork()
if child == 0:
    while True: time.sleep(1)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
time.sleep(0.2)
print(os.WTERMSIG(status), stop.wanted, flush=True)
"""
    process = start("print(flush=True)\n" + body)
    out, _ = process.communicate(timeout=10)
    assert out.split() == [str(int(signal.SIGTERM)), "False"]
    assert process.returncode == 0


def test_the_time_limit_leaves_room_for_a_step_and_a_commit():
    limit = TimeLimit(time.time() + 100, margin_s=60)
    assert not limit.is_near()
    limit.step_s, limit.save_s = 15, 20
    assert not limit.is_near()
    limit.save_s = 30
    assert limit.is_near()


@pytest.mark.parametrize("hours", [24, -24])
def test_a_clock_that_is_set_changes_nothing_about_the_time_limit(tmp_path, hours):
    body = """
from ft_dist.preemption.slurm import TimeLimit
limits = TimeLimit(time.time() + 3600, margin_s=60), TimeLimit(time.time() + 30, margin_s=60)
started = time.time()
print(flush=True)
input()
print(round((time.time() - started) / 3600), *(limit.is_near() for limit in limits))
"""
    failing = Shim(tmp_path, [Rule("clock", "", str(hours * 3600))])
    failing.disarm()
    process = start(body, **failing.environment)
    failing.arm()
    out, err = process.communicate("\n", timeout=10)
    assert out.split() == [str(hours), "False", "True"], err


def scontrol(folder: Path, answer: str) -> dict[str, str]:
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\n[ "$*" = "show job --oneliner 77" ] || exit 1\necho "{answer}"\n')
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}


def test_the_end_of_a_job_comes_from_the_environment_or_from_scontrol(tmp_path):
    assert job_ends_at({}) is None
    assert job_ends_at({"SLURM_JOB_END_TIME": "1700000000", "SLURM_JOB_ID": "77", "PATH": str(tmp_path)}) == 1.7e9
    assert job_ends_at({"SLURM_JOB_ID": "77", "PATH": str(tmp_path)}) is None
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(1.7e9))
    shown = f"JobId=77 JobName=x RunTime=00:01:00 StartTime=2026-01-01T00:00:00 EndTime={at} Deadline=N/A"
    assert job_ends_at(scontrol(tmp_path, shown)) == 1.7e9
    assert job_ends_at(scontrol(tmp_path, shown) | {"SLURM_JOB_ID": "78"}) is None
    assert job_ends_at(scontrol(tmp_path, "JobId=77 EndTime=Unknown")) is None


def test_an_endpoint_needs_its_cloud():
    from ft_dist.config import load_config

    with pytest.raises(ConfigError, match=r"needs preemption\.cloud"):
        load_config("smoke", ["preemption.endpoint=http://127.0.0.1:1"])
