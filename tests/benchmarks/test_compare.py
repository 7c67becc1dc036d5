"""Unequal work is not ranked, failures are reported, and a hung side is killed with its children."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.case import Command
from benchmarks.peers.compare import summary, table
from benchmarks.peers.process import run
from benchmarks.peers.turn import reason


def turn(labelled: float, first_loss: float, mean_loss: float = 1.0) -> dict[str, Any]:
    return {
        "labelled_tokens_per_s": labelled,
        "real_tokens_per_s": labelled * 5,
        "first_step_s": 10.0,
        "step_s": 1.0,
        "first_loss": first_loss,
        "mean_loss": mean_loss,
        "peak_bytes": 2**30,
        "steps": 5,
    }


def test_a_side_with_another_first_loss_is_shown_and_not_ranked() -> None:
    taken = {
        "ours": [turn(100, 2.5), turn(120, 2.5)],
        "trl": [turn(50, 2.5001), turn(60, 2.5001)],
        "cheat": [turn(900, 2.4), turn(900, 2.4)],
    }
    report = summary(taken, dtype="fp32")
    assert report["ranking"] == ["ours", "trl"]
    assert report["ratios"]["labelled_tokens_per_s_best"] == 110 / 55
    shown = table(report | {"failures": {"axolotl": "not installed: no wheel"}})
    assert "NOT THE SAME WORK: first loss 2.40000, ours 2.50000" in shown
    assert "axolotl               failed: not installed: no wheel" in shown


def test_packed_rows_are_compared_by_the_mean_loss() -> None:
    taken = {
        "ours": [turn(100, 2.5, 2.0)],
        "near packed": [turn(100, 3.0, 2.02)],
        "leaking packed": [turn(300, 3.0, 1.5)],
    }
    report = summary(taken, dtype="fp32")
    assert report["ranking"] == ["ours", "near packed"]
    assert report["sides"]["leaking packed"]["difference"] == "mean loss 1.50000, ours 2.00000"


def test_without_our_own_figures_nothing_is_ranked() -> None:
    report = summary({"trl": [turn(50, 2.5)]}, dtype="fp32")
    assert (report["ranking"], report["ratios"]) == ([], {})


def test_a_hang_is_cut_off_with_its_children(tmp_path: Path) -> None:
    child = "import os, time; open('child', 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; print('one', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    finished = run(Command([sys.executable, "-c", parent]), folder=tmp_path, limit_s=4)
    assert time.monotonic() - started < 30
    assert finished.code is None
    assert [line for _, line in finished.lines] == ["one"]
    assert reason(finished, 0, 4) == "cut off after 4 s at step 0"
    pid = int((tmp_path / "child").read_text())
    assert not _alive(pid)


def test_a_failure_is_reported_with_its_error(tmp_path: Path) -> None:
    script = "import sys; print('ValueError: no such layer'); print('CalledProcessError: child'); sys.exit(3)"
    finished = run(Command([sys.executable, "-c", script]), folder=tmp_path, limit_s=60)
    assert reason(finished, 0, 60) == "exit code 3 after 0 steps: ValueError: no such layer"


def test_memory_of_the_whole_tree_is_counted(tmp_path: Path) -> None:
    child = "import time; block = b'x' * 200_000_000; time.sleep(1.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    finished = run(Command([sys.executable, "-c", parent]), folder=tmp_path, limit_s=60)
    assert finished.code == 0
    assert 200e6 < finished.peak_bytes < 400e6


def test_steps_in_a_file_get_timestamps_as_they_arrive(tmp_path: Path) -> None:
    script = "import time\nfor n in range(3):\n open('steps', 'a').write(f'{n}\\n')\n time.sleep(0.3)\n"
    finished = run(Command([sys.executable, "-c", script], steps_file=tmp_path / "steps"), folder=tmp_path, limit_s=60)
    times = [when for when, _ in finished.step_lines]
    assert [line for _, line in finished.step_lines] == ["0", "1", "2"]
    assert times[1] - times[0] > 0.1


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
