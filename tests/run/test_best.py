"""`optim.load_best` and `evaluate.patience` on runs that soon know their four samples by heart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ft_dist.checkpoint.find import commit_of_step
from ft_dist.result.export import export_run
from tests.conftest import ROOT, read_lines

INTERVAL, PATIENCE, MOST_STEPS = 2, 3, 40
CASES = [("full", 3, "fp32", 2), ("lora", 1, "bf16", 2), ("full", 2, "bf16", 1)]
ALONE = ("lora", 0, "fp32", 1)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Four samples, on which held-out loss soon rises."""
    path = tmp_path_factory.mktemp("data") / "few.jsonl"
    lines = (ROOT / "configs" / "emails" / "train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    return path


def arguments(folder: Path, few: Path, case: tuple[str, int, str, int] = ALONE, **settings: object) -> list[str]:
    kind, stage, dtype, ranks = case
    tree = {
        "output_dir": folder,
        "data.train": f"[{few}]",
        "method.kind": kind,
        "model.dtype": dtype,
        "engine.zero_stage": stage,
        "batch.global_rows": 2,
        "optim.lr": 0.01 if kind == "full" else 0.1,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "optim.epochs": 100,
        "optim.max_steps": MOST_STEPS,
        "optim.load_best": "true",
        "evaluate.interval_steps": INTERVAL,
        "evaluate.patience": PATIENCE,
        "evaluate.max_samples": 8,
        "checkpoint.interval_steps": 0,
        "checkpoint.keep": 1,
    } | settings
    return ["train", "smoke", *(f"{key}={value}" for key, value in tree.items()), "--nproc", str(ranks)]


def losses(folder: Path) -> dict[int, float]:
    """Held-out losses by step, as the last evaluation of each step found them."""
    events = read_lines(folder / "events.jsonl")
    return {event["step"]: event["scores"]["loss"] for event in events if event["event"] == "evaluated"}


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def same(one: Path, two: Path) -> bool:
    first, second = weights(one), weights(two)
    dtypes = {name: tensor.dtype for name, tensor in first.items()}
    assert dtypes == {name: tensor.dtype for name, tensor in second.items()}
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_result_is_the_best_step(cli, tmp_path, few, case):
    folder = tmp_path / "run"
    done = cli(*arguments(folder, few, case))
    assert done.returncode == 0, done.stderr
    found = losses(folder)
    best = min(found, key=lambda step: found[step])
    last = max(found)
    assert 0 < best == last - PATIENCE * INTERVAL < MOST_STEPS
    kept = summary(folder)
    assert (kept["steps"], kept["final_step"], kept["best_step"], kept["stopped_early"]) == (last, best, best, True)
    during = [e for e in read_lines(folder / "events.jsonl") if e.get("when") == "during" and e["step"] == best]
    assert kept["after"]["loss"] == during[0]["scores"]["loss"]
    assert f"stopped early after step {last}: 3 evaluations in a row" in done.stdout
    assert f"final/ gets the weights of step {best}" in done.stdout
    for step in (best, last):
        export_run(folder, kind="merged" if case[0] == "full" else "adapter", to=tmp_path / f"{step}", step=step)
        assert same(folder / "final", tmp_path / f"{step}") == (step == best)


def test_a_resumed_run_stops_at_the_same_step_and_a_finished_one_stays_finished(cli, tmp_path, few):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli(*arguments(whole, few)).returncode == 0
    last, best = summary(whole)["steps"], summary(whole)["final_step"]
    assert best < last - INTERVAL
    # stopped after two evaluations without improvement; the third comes after the resume
    stopped = cli(*arguments(parts, few, **{"optim.max_steps": last - INTERVAL}))
    assert stopped.returncode == 0, stopped.stderr
    assert (summary(parts)["stopped_early"], summary(parts)["final_step"]) == (False, best)
    for _ in range(2):
        resumed = cli(*arguments(parts, few))
        assert resumed.returncode == 0, resumed.stderr
        assert "stopped early" in resumed.stdout
        assert losses(parts) == losses(whole)
        assert summary(parts)["after"] == summary(whole)["after"]
        assert same(parts / "final", whole / "final")
    # a patient run continues from the last step, not from the best
    patient = cli(*arguments(parts, few, **{"evaluate.patience": "null", "optim.max_steps": last + INTERVAL}))
    assert patient.returncode == 0, patient.stderr
    assert f"resumed from step {last}" in patient.stdout
    assert summary(parts)["steps"] == last + INTERVAL
    found = losses(parts)
    assert summary(parts)["final_step"] == min(found, key=lambda step: found[step])


def test_a_resumed_run_begins_with_the_evaluation_that_a_stop_prevented(cli, tmp_path, few):
    folder, two = tmp_path / "run", {"optim.max_steps": 2}
    unevaluated = {
        "evaluate.interval_steps": 0,
        "evaluate.patience": "null",
        "optim.load_best": "false",
        "data.eval": "[]",
    }
    assert cli(*arguments(folder, few, **two, **unevaluated)).returncode == 0
    assert losses(folder) == {}
    resumed = cli(*arguments(folder, few, **two))
    assert resumed.returncode == 0, resumed.stderr
    assert list(losses(folder)) == [2]
    # its commit now holds the loss
    assert commit_of_step(folder / "checkpoints", "best").step == 2


def test_a_lost_best_commit_is_reported_and_the_next_best_used(cli, tmp_path, few):
    folder = tmp_path / "run"
    assert cli(*arguments(folder, few, **{"checkpoint.keep": 100})).returncode == 0
    best = summary(folder)["final_step"]
    damaged = folder / "checkpoints" / f"step-{best:08d}" / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = cli(*arguments(folder, few, **{"checkpoint.keep": 100}))
    assert again.returncode == 0, again.stderr
    assert str(damaged) in again.stdout
    assert f"note: step {best} had a lower held-out loss" in again.stdout
    found = losses(folder)
    assert summary(folder)["final_step"] == min(set(found) - {best}, key=lambda step: found[step])


@pytest.mark.parametrize("key", ["optim.load_best=true", "evaluate.patience=2"])
@pytest.mark.parametrize(
    "settings, missing",
    [
        (["evaluate.interval_steps=0"], "evaluate.interval_steps > 0"),
        (["data.eval=[]", "evaluate.interval_steps=5"], "data.eval"),
    ],
)
def test_they_need_evaluations_during_training(cli, tmp_path, key, settings, missing):
    done = cli("train", "smoke", f"output_dir={tmp_path / 'run'}", key, *settings)
    assert done.returncode == 2
    name = key.partition("=")[0]
    assert done.stderr == (
        f"ft-dist: error: {key} needs held-out losses during training. Set {missing}, or remove {name}.\n"
    )
    assert not (tmp_path / "run").exists()
