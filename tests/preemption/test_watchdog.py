"""A process without progress writes its stacks and exits; one that is slow for a reason does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, read_lines

SCRIPT = """
import sys, threading, time
from pathlib import Path
from ft_dist.preemption import watchdog as module
from ft_dist.preemption.signals import listen
from ft_dist.preemption.stop import StopRequest
module.NOTICE_S = 1.0
stop = StopRequest()
listen(stop)
stop.training_started()
watchdog = module.Watchdog(timeout_s={timeout_s}, run_dir=Path(sys.argv[1]), rank=0, stop=stop)
watchdog.step = 7
watchdog.start()

def stuck_in_the_loader():
    threading.Event().wait()

def beat(seconds):
    for _ in range(int(seconds * 20)):
        watchdog.beat()
        time.sleep(0.05)

print("started", flush=True)
"""


def start(folder: Path, body: str, *, timeout_s: float = 1.5) -> subprocess.Popen[str]:
    script = SCRIPT.replace("{timeout_s}", str(timeout_s)) + body
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def stacks(folder: Path) -> str:
    return (folder / "logs" / "rank-0-stacks.log").read_text()


def test_a_hang_ends_with_76_and_the_stacks_of_all_threads(tmp_path):
    body = "threading.Thread(target=stuck_in_the_loader, daemon=True).start()\nbeat(0.5)\ntime.sleep(60)\n"
    process = start(tmp_path, body)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 76
    assert "no progress" in err
    assert "after step 7" in err
    assert "engine.hang_timeout_s (1.5)" in err
    written = stacks(tmp_path)
    assert "stuck_in_the_loader" in written
    assert 'File "<string>"' in written
    assert [event["event"] for event in read_lines(tmp_path / "events.jsonl")] == ["hung"]


def test_progress_and_long_commits_are_not_a_hang(tmp_path):
    body = "beat(2.5)\nwith watchdog.during('a commit', timeout_s=60): time.sleep(2.5)\nbeat(0.3)\nwatchdog.close()\n"
    process = start(tmp_path, body)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_commit_that_hangs_is_noticed_too(tmp_path):
    process = start(tmp_path, "with watchdog.during('a commit', timeout_s=1.0): time.sleep(60)\n", timeout_s=600)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 76
    assert "in a commit after step 7" in err


def test_after_a_notice_a_run_without_progress_exits_with_75(tmp_path):
    process = start(tmp_path, "stuck_in_the_loader()\n", timeout_s=600)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "asked to stop (SIGTERM)" in err
    assert "stuck_in_the_loader" in stacks(tmp_path)


def test_after_a_notice_a_step_may_take_twice_the_longest_so_far(tmp_path):
    body = "time.sleep(2)\nbeat(0.5)\nprint(flush=True)\ntime.sleep(2.2)\nwatchdog.beat()\nwatchdog.close()\n"
    process = start(tmp_path, body, timeout_s=600)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_suspended_process_continues(tmp_path):
    process = start(tmp_path, "beat(1)\nprint(flush=True)\ntime.sleep(0.6)\nbeat(1)\nwatchdog.close()\n")
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_the_launcher_can_ask_for_stacks_of_a_process_that_holds_the_lock(tmp_path):
    # a C call through PyDLL holds the interpreter's lock: no Python thread of this process runs
    process = start(tmp_path, "import ctypes; print(flush=True); ctypes.PyDLL(None).sleep(60)\n")
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGQUIT)
    deadline = time.monotonic() + 10
    while 'File "<string>"' not in stacks(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()


@pytest.mark.parametrize("codes, whole", [([75, 1], 75), ([76, -9], 76), ([76, 75], 75), ([2, 76], 2), ([0, 1], 1)])
def test_the_exit_code_of_the_run(codes, whole):
    from ft_dist.launcher.elastic.restarts import combined_exit_code

    assert combined_exit_code(codes) == whole
