"""Real timings of the training loop on two gloo ranks, the records of a sweep, and the arithmetic."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ft_dist.bench import measure
from ft_dist.bench.figures import figures
from ft_dist.bench.report import bench
from ft_dist.bench.show import html, text
from ft_dist.bench.spec import Spec, make_spec
from ft_dist.bench.synthetic import SyntheticStore
from ft_dist.errors import UserError
from tests.chaos.storm import workers_of
from tests.conftest import CLI, ROOT
from tests.ports import free_port


def test_two_ranks_of_a_random_model(cli: Any, tmp_path: Path) -> None:
    arguments = ["--length", "64", "--rows", "4", "--lengths", "20", "--labelled", "0.5", "--steps", "2"]
    done = cli("bench", "tiny", *arguments, "--nproc", "2", "--to", str(tmp_path), "--json", "engine.zero_stage=2")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (one,) = report["measurements"]
    assert one["world_size"] == 2
    assert one["zero_stage"] == 2
    assert 0 < one["labelled_tokens_per_s"] < one["real_tokens_per_s"]
    assert all(one["time"][phase] > 0 for phase in ("forward", "backward", "optimizer", "communication", "checkpoint"))
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    page = (tmp_path / "bench.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page, "nothing is fetched"
    assert "fused" in one["kernels"], "the product's own engine"


def test_the_ranks_of_torchrun_measure_together(tmp_path: Path) -> None:
    options = f"--nproc-per-node 2 --master-port {free_port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options.split()]
    bench = ["-m", "ft_dist.cli", "bench", "tiny", "--length", "64", "--steps", "1", "--to", str(tmp_path)]
    done = subprocess.run([*torchrun, *bench, "model.dtype=fp32"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("where a step's time goes") == 1
    assert json.loads((tmp_path / "bench.json").read_text())["measurements"][0]["world_size"] == 2


def spec(folder: Path, *overrides: str, **changed: Any) -> Spec:
    settings: dict[str, Any] = {
        "data": "synthetic",
        "method": "lora",
        "length": 64,
        "rows": 4,
        "lengths": "full",
        "labelled": 1.0,
        "steps": 2,
        "checkpoint": False,
        "folder": folder,
    }
    return make_spec(overrides=overrides, **{"model": "tiny"} | settings | changed)


def seen(step_s: float, **changed: Any) -> dict[str, Any]:
    record = {
        "step_s": step_s,
        "data_wait_s": 0.0,
        "real_tokens": 100,
        "labelled_tokens": 50,
        "padded_tokens": 100,
        "computed_tokens": 100,
    }
    warm = record | {"step_s": 100.0}
    return {
        "records": [warm, warm, record, record, record, record],
        "phases": [{"forward": 0.2, "backward": 0.4, "optimizer": 0.2, "communication": 0.1}] * 2,
        "parameters": 1000,
        "trainable_share": 0.0,
        "attention_width": 10,
        "context": 5.0,
        "world_size": 1,
        "zero_stage": 2,
        "kernels": "",
        "peak_bytes": 1 << 30,
        "device": "cpu",
        "peak_flops": 1e6,
        "peak_flops_measured": True,
        "versions": {},
        **changed,
    }


def test_rates_leave_out_padding_and_warm_up(tmp_path: Path) -> None:
    found = figures(spec(tmp_path), seen(1.0))
    assert found["real_tokens_per_s"] == 100
    assert found["labelled_tokens_per_s"] == 50
    assert found["padded_share"] == 0.5
    # 4 N + 12 x width x context, per token
    assert found["mfu"] == pytest.approx(100 * (4 * 1000 + 12 * 10 * 5) / 1e6)
    full = figures(spec(tmp_path), seen(1.0, trainable_share=1.0))
    assert full["flops_a_token"] == 6 * 1000 + 12 * 10 * 5


def test_the_phases_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    time = figures(spec(tmp_path), seen(1.0))["time"]
    assert sum(seconds for phase, seconds in time.items() if phase != "checkpoint") == pytest.approx(1.0)
    assert time["other"] == pytest.approx(0.1), "what no phase has"


def test_a_collective_does_not_count_for_the_phase_it_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    from ft_dist.bench import phases

    clock = [0.0]

    def takes(seconds: float) -> None:
        clock[0] += seconds

    def backward() -> None:
        takes(3.0)
        dist.all_reduce(None)

    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda _: takes(1.0))
    engine: Any = SimpleNamespace(world=SimpleNamespace(device=torch.device("cpu")))
    timer = phases.Phases(engine)
    with timer.communication():
        with engine.on_phase("backward"):
            backward()
        dist.all_reduce(None)  # between phases
        with engine.on_phase("optimizer"):
            takes(5.0)
    assert timer.taken() == {"backward": 3.0, "optimizer": 5.0, "communication": 2.0}


def test_a_sweep_names_the_fastest_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(one: Spec, *, nproc: int) -> dict[str, Any]:
        rows = one.config().batch.micro_rows
        if rows == 4:
            raise UserError("out of memory")
        return figures(one, seen(1 / rows))

    monkeypatch.setattr(measure, "measure_once", run)
    swept = {"batch.micro_rows": [1, 2, 4]}
    found = measure.sweep(spec(tmp_path), swept, nproc=1, folder=tmp_path, say=lambda line: None)
    report = {"kind": "sweep", "title": "t", "swept": list(swept), "measurements": found}
    assert [record["batch.micro_rows"] for record in found] == [2, 1, 4]
    assert text(report).endswith("fastest that fits: batch.micro_rows=2")
    assert "out of memory" in text(report)
    assert html(report).count("<svg") == 3


def test_a_sweep_skips_what_the_memory_plan_rejects(tmp_path: Path) -> None:
    swept = {"engine.zero_stage": [0, 2]}
    large = spec(tmp_path, model="llama3-8b", length=131072)
    found = measure.sweep(large, swept, nproc=1, folder=tmp_path, say=lambda line: None)
    assert ["per rank planned" in record["failed"] for record in found] == [True, True]
    assert not (tmp_path / "sweep-0").exists()


def test_a_signal_ends_a_whole_sweep(tmp_path: Path) -> None:
    """It ends more than the current measurement."""
    log = tmp_path / "said"
    command = [*CLI, "bench", "tiny", "--length", "64", "--steps", "100000", "--sweep"]
    with log.open("wb") as said, subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said) as sweep:
        deadline = time.monotonic() + 120
        while not workers_of(sweep.pid, module="ft_dist.bench.rank"):
            assert sweep.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        sweep.send_signal(signal.SIGINT)
        assert sweep.wait(timeout=60) == 75
    assert "a signal ended the measurement" in log.read_text()


def test_efficiency_is_the_share_of_perfect_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def run(one: Spec, *, nproc: int) -> dict[str, Any]:
        rows.append((one.config().batch.global_rows, one.config().batch.micro_rows))
        return figures(one, seen(1.0 if nproc == 1 else 0.625, world_size=nproc))

    monkeypatch.setattr(measure, "measure_once", run)
    for weak in (True, False):
        found = measure.scale(spec(tmp_path), [1, 2], weak=weak, folder=tmp_path, say=lambda line: None)
        assert [record["efficiency"] for record in found] == [1.0, pytest.approx(0.8)]
    assert rows == [(4, 4), (8, 4), (4, 4), (4, 2)]


def test_synthetic_samples_have_the_requested_lengths_and_labels() -> None:
    store = SyntheticStore(max_length=512, median=100, labelled=0.25, vocabulary=50, seed=1)
    ids = np.arange(2000)
    assert 90 < np.median(store.lengths_of(ids)) < 110
    assert store.labelled_of(ids).sum() / store.lengths_of(ids).sum() == pytest.approx(0.25, abs=0.01)
    tokens, mask, lengths = store.gather(ids[:50])
    assert (len(tokens), len(mask)) == (lengths.sum(), lengths.sum())
    assert mask.sum() == store.labelled_of(ids[:50]).sum()
    assert tokens.max() < 50
    assert (SyntheticStore(max_length=64, median=None, labelled=1, vocabulary=9, seed=0).lengths_of(ids) == 64).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "mine.jsonl"}, "has no tokenizer"),
        ({"labelled": 0.0}, "must be above 0"),
        ({"lengths": "long"}, "must be full, or a median"),
    ],
)
def test_invalid_options_are_reported(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        spec(tmp_path, **changed)


def test_a_setting_that_cannot_fit_is_refused(cli: Any) -> None:
    done = cli("bench", "llama3-8b", "--length", "131072", "--rows", "8")
    assert done.returncode == 2
    assert "this run needs about" in done.stderr
    assert "--force starts it anyway" in done.stderr


def test_a_missing_model_is_reported(cli: Any) -> None:
    done = cli("bench", "no-such-model")
    assert done.returncode == 2
    assert "neither a model folder nor one of the shapes llama3-8b" in done.stderr


def test_a_failed_measurement_keeps_its_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> int:
        os.write(1, b"RuntimeError: an illegal memory access\n")
        return 1

    monkeypatch.setattr(measure, "run_here", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserError, match="an illegal memory access") as raised:
        bench("tiny", [], length=64, nproc=1)
    (log,) = tmp_path.rglob("output.log")
    assert str(log) in str(raised.value)
    with pytest.raises(UserError, match="exit code 1"):
        bench("tiny", [], length=64, nproc=1, work=tmp_path / "to" / "work")
    assert "illegal" in (tmp_path / "to" / "work" / "output.log").read_text()


def test_timed_steps_are_kept_if_a_later_part_fails(tmp_path: Path) -> None:
    """A profiler or a commit may fail. The ranks' logs are kept too."""
    one = spec(tmp_path)
    code = (
        "import sys, ft_dist.bench.phases as phases; phases.Phases = None;"
        "from ft_dist.bench.rank import main; main(sys.argv[1:])"
    )
    written = one.write(tmp_path / "spec.json")
    done = subprocess.run(
        [sys.executable, "-c", code, str(written)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "'NoneType' object is not callable" in done.stderr
    record = figures(one, json.loads(Path(one.result).read_text()))
    assert record["real_tokens_per_s"] > 0
    assert record["time"] == {}


def test_a_given_folder_keeps_logs_and_figures_but_no_checkpoint(cli: Any, tmp_path: Path) -> None:
    stale = tmp_path / "to" / "work" / "run" / "checkpoints" / "step-9"
    stale.mkdir(parents=True)
    done = cli("bench", "tiny", "--length", "64", "--steps", "1", "--to", str(tmp_path / "to"))
    assert done.returncode == 0, done.stderr
    work = tmp_path / "to" / "work"
    assert (work / "output.log").is_file()
    assert (work / "run" / "logs" / "rank-0.log").is_file()
    record = json.loads((work / "record.json").read_text())
    assert record["checkpoint_s"] > 0
    assert record == json.loads((tmp_path / "to" / "bench.json").read_text())["measurements"][0]
    assert not (work / "run" / "checkpoints").exists()
