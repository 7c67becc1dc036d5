"""`benchmarks/gpu.sh`: a stage that crashes, hangs or takes too long costs only itself, and its rows are kept."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_report, readme
from benchmarks.gpu import __main__ as script
from benchmarks.gpu import driver as driving
from benchmarks.gpu.driver import Driver, cut_in_the_middle, marked
from benchmarks.gpu.stages import STAGES, Stage, limit_of, table
from benchmarks.gpu.wheels import install
from tests.conftest import ROOT, read_lines

STAGE_MODULE = "tests.benchmarks.stage"


def stage(ending: str, seconds: float = 30.0) -> Stage:
    command = (STAGE_MODULE, ending)
    return Stage(ending, seconds, "a test", command, command)


def ran(tmp_path: Path, stages: list[Stage], total_s: float = 300.0) -> tuple[Driver, int]:
    driver = Driver(tmp_path / "out", tmp_path / "work", total_s)
    return driver, driver.run_all(stages)


def rows_of(driver: Driver, kind: str) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in read_lines(driver.results) if row["kind"] == kind}


def gone(pid: int) -> bool:
    """Ended, or at least no longer able to do anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_budgets_fit_into_one_call() -> None:
    assert sum(one.seconds for one in STAGES) <= 410
    listed = subprocess.run(["benchmarks/gpu.sh", "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout.strip() == table(STAGES)
    assert listed.stdout.split()[-1] == "410"


def test_a_stage_overruns_only_into_unpromised_time() -> None:
    assert limit_of(40, later=100, left=200) == 80, "by its own seconds at most"
    assert limit_of(40, later=100, left=150) == 50
    assert limit_of(40, later=100, left=120) == 40, "its own seconds are its own; the last ones lose"
    assert limit_of(40, later=0, left=25) == 25, "shrunk"
    assert limit_of(40, later=0, left=15) is None, "skipped"


def test_a_crash_or_a_kill_keeps_all_rows(tmp_path: Path) -> None:
    driver, bad = ran(tmp_path, [stage("crash"), stage("fine"), stage("killed"), stage("fine too")])
    said, ended = rows_of(driver, "said"), rows_of(driver, "stage")
    assert list(said) == ["crash", "fine", "killed", "fine too"]
    assert {name: row["outcome"] for name, row in ended.items()} == {
        "crash": "failed",
        "fine": "done",
        "killed": "failed",
        "fine too": "done",
    }
    assert bad == 2
    assert ended["crash"]["tail"].endswith("RuntimeError: a kernel went wrong")
    assert "in <module>" in ended["crash"]["tail"], "the whole traceback"
    assert ended["killed"]["why"] == "killed by signal 9"
    assert "last words of killed" in driver.log.read_text()


def test_a_stage_over_its_time_is_killed_with_its_children(tmp_path: Path) -> None:
    started = time.monotonic()
    # the import alone takes a second or two on a busy machine
    driver, bad = ran(tmp_path, [stage("hang", seconds=4), stage("fine")], total_s=5 + 4 + 30)
    assert time.monotonic() - started < 30
    assert bad == 1
    ended = rows_of(driver, "stage")
    assert ended["hang"]["outcome"] == "cut"
    assert ended["hang"]["why"].startswith("cut off after 4")
    assert ended["fine"]["outcome"] == "done"
    assert gone(rows_of(driver, "said")["hang"]["child"]), "also what it started in a session of its own"


def test_the_total_deadline_skips_and_reports_the_last_stages(tmp_path: Path) -> None:
    driver, bad = ran(tmp_path, [stage("hang", seconds=3), stage("fine", seconds=60)], total_s=5 + 3 + 2)
    ended = rows_of(driver, "stage")
    assert ended["fine"]["outcome"] == "skipped"
    assert "needs 60 s" in ended["fine"]["why"]
    assert bad == 2
    assert time.time() - driver.started < 10 + driving.GRACE_S + 1


def test_long_output_is_cut_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driving, "MAX_BYTES", 10_000)
    driver, _ = ran(tmp_path, [stage("long"), stage("fine")])
    text = driver.log.read_text()
    assert driver.log.stat().st_size < 11_000
    assert text.lstrip().startswith("== long")
    assert "were cut out here" in text
    assert text.endswith("last words of fine\n")
    path = tmp_path / "file"
    path.write_bytes(b"a" * 900 + b"z" * 900)
    cut_in_the_middle(path, 500)
    assert path.stat().st_size == 500
    assert path.read_bytes().startswith(b"a" * 100)
    assert path.read_bytes().endswith(b"z" * 100)


def test_a_file_over_the_size_limit_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "MAX_BYTES", 100)
    driver = Driver(tmp_path / "out", tmp_path / "work", 60, dry=True)
    (driver.out / "trace.json.gz").write_bytes(b"x" * 200)
    (driver.out / "profile.txt").write_bytes(b"x" * 50)
    script.bound(driver)
    assert sorted(path.name for path in driver.out.iterdir()) == ["log.txt", "profile.txt", "results.jsonl"]
    assert read_lines(driver.results)[-1]["file"] == "trace.json.gz"


def test_stopping_the_script_is_recorded_and_leaves_nothing_running(tmp_path: Path) -> None:
    code = (
        "import sys; from benchmarks.gpu import __main__ as m, stages; from tests.benchmarks.test_gpu import stage;"
        "m.STAGES = (stage('hang', 100.0),); m.NAMES = ['hang']; sys.exit(m.main())"
    )
    command = [sys.executable, "-c", code, "--dry-run", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    results = tmp_path / "results.jsonl"
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        deadline = time.monotonic() + 60
        while not (results.exists() and '"said"' in results.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    rows = read_lines(results)
    assert [row["why"] for row in rows if row["kind"] == "stage"] == ["the script was stopped"]
    assert all(gone(row["child"]) for row in rows if row["kind"] == "said")
    assert marked("no such mark") == []


def test_torch_is_not_needed_to_start() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from benchmarks.gpu.__main__ import main; sys.exit(main(['--list']))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_a_bad_wheel_does_not_stop_the_others(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("one", "two"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            info = f"{name}-1.0.dist-info"
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nowhere\n"
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    done = install(wheels, tmp_path / "site")
    assert list(done["failed"]) == ["broken-1.0-py3-none-any.whl"]
    assert {"one.py", "two.py"} <= {path.name for path in (tmp_path / "site").iterdir()}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole list on CPU, in one process tree."""
    out = tmp_path_factory.mktemp("gpu")
    command = ["benchmarks/gpu.sh", "--dry-run", "--total-s", "1500", "--out", str(out)]
    # a slow test machine must not count as a failure
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    print(done.stdout, done.stderr)
    return out


def test_the_whole_list_runs_on_cpu(dry_run: Path) -> None:
    rows = read_lines(dry_run / "results.jsonl")
    ended = {row["stage"]: row for row in rows if row["kind"] == "stage"}
    assert list(ended) == [one.name for one in STAGES]
    not_there = {name for name, row in ended.items() if row["outcome"] == "not available"}
    assert not_there <= {"liger", "unsloth", "bench-fp8", "bench-fp8-chats"}
    assert {
        name: row.get("tail") for name, row in ended.items() if row["outcome"] not in ("done", "not available")
    } == {}
    kinds = {row["kind"] for row in rows}
    assert {"about", "ceiling", "attention", "compile", "step", "profile", "parity", "bench", "side", "op"} <= kinds
    files = list(dry_run.iterdir())
    assert len(files) <= 8
    assert all(path.is_file() and path.stat().st_size <= 16 << 20 for path in files)
    log = (dry_run / "log.txt").read_text()
    assert "-- output.log" in log, "what the ranks said"
    for one in STAGES:
        assert f"== {one.name} (" in log or ended[one.name]["outcome"] == "not available"


def test_the_output_folder_becomes_results_and_tables(dry_run: Path, tmp_path: Path) -> None:
    """With the name of a chip in it, as a GPU would have brought it back."""
    rows = read_lines(dry_run / "results.jsonl")
    for row in rows:
        row |= {"dry": False} if row["kind"] == "run" else {}
        row |= {"chip": {"name": "NVIDIA H100 80GB HBM3"}} if row["kind"] == "about" else {}
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "torn')
    docs, front = tmp_path / "benchmarks.md", tmp_path / "README.md"
    docs.write_text("# Benchmarks\n")
    front.write_text(f"before\n{readme.BEGIN}\n{readme.END}\nafter\n")
    to = ["--results", str(tmp_path / "results"), "--docs", str(docs), "--readme", str(front)]
    for _ in range(2):  # the second time, the markers exist
        assert gpu_report.main([str(tmp_path), *to]) == 0
    (written,) = (tmp_path / "results").iterdir()
    assert written.name.endswith("-nvidia-h100-80gb-hbm3.json")
    report = json.loads(written.read_text())
    assert report["ratios"]["hf"]["tokens_per_s"] > 0
    assert report["parity"]["checks"] > 20
    assert docs.read_text().count("NVIDIA H100 80GB HBM3") == 1
    assert "| bare step, hf |" in docs.read_text()
    assert "| NVIDIA H100 80GB HBM3 | Llama-3-8B LoRA, packed chats |" in front.read_text()
    assert front.read_text().startswith("before\n")


def test_a_dry_run_does_not_reach_the_results_of_the_project(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"kind": "run", "dry": true, "date": "2026-01-01"}\n')
    assert gpu_report.main([str(tmp_path)]) == 2


def test_early_figures_stay_if_the_rest_fails() -> None:
    rows = [
        {"stage": "bench", "kind": "bench timed", "real_tokens_per_s": 5.0, "step_s": 1.0, "peak_bytes": 1},
        {"stage": "bench", "kind": "bench", "failed": "the commit"},
        {"stage": "bench", "kind": "stage", "outcome": "failed", "why": "exit code 1"},
    ]
    report = gpu_report.report_of(rows)
    assert report["bench"]["bench"]["real_tokens_per_s"] == 5.0
    assert "Not measured: bench: failed, exit code 1." in gpu_report.section(report)


def test_the_list_of_kernels_is_built_without_touching_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has initialised CUDA cannot be forked into the compile workers."""
    import torch

    from benchmarks.gpu import compile as compiling

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the parent asked for the device")

    for name in (
        "is_available",
        "get_device_capability",
        "get_device_properties",
        "device_count",
        "init",
        "_lazy_init",
    ):
        monkeypatch.setattr(torch.cuda, name, refuse)
    items = compiling.work(tiny=False)
    assert [item[0] for item in items[:4]] == ["step", "step", "step", "op"]
    assert len(items) > 60
