"""Runs with special settings: non-finite numbers, offload, activation checkpointing, other adapters."""

import pytest

from tests.conftest import SMALL_RUN, read_lines


def train(cli, folder, *overrides, nproc=2):
    return cli("train", *SMALL_RUN, f"output_dir={folder}", *overrides, "--nproc", str(nproc))


def losses(folder):
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_non_finite_steps_are_skipped_then_stop_the_run(cli, tmp_path, stage):
    explode = ["method.kind=full", "optim.lr=1e30", "optim.max_grad_norm=0", "optim.max_skipped_steps=3"]
    done = train(cli, tmp_path / "run", *explode, f"engine.zero_stage={stage}", "--max-restarts", "0")
    assert done.returncode == 1
    assert "not finite in 3 steps in a row" in done.stderr
    assert "Traceback" not in done.stderr
    skipped = [event["step"] for event in read_lines(tmp_path / "run/events.jsonl") if event["event"] == "skipped"]
    assert len(skipped) == 3
    assert [line["grad_norm"] for line in read_lines(tmp_path / "run/metrics.jsonl")][-3:] == [None] * 3


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.zero_stage=2", "engine.offload=cpu"],
        ["engine.zero_stage=3", "engine.offload=cpu"],
        ["engine.zero_stage=3", "engine.activation_checkpointing=true"],
        ["engine.zero_stage=2", "model.kernels=off"],
    ],
)
def test_execution_settings_do_not_change_the_result(cli, tmp_path, overrides):
    assert train(cli, tmp_path / "plain", "engine.zero_stage=1", nproc=1).returncode == 0
    done = train(cli, tmp_path / "other", *overrides)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_the_fused_path_covers_dropout_and_the_head(cli, tmp_path):
    overrides = [
        "model.path=tiny-smollm",
        "method.dropout=0.05",
        "method.target_modules=[q_proj,v_proj,up_proj,lm_head]",
        "engine.zero_stage=3",
    ]
    done = train(cli, tmp_path / "run", *overrides)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("kernels"))
    assert "LoRA linears" in line
    assert "output head with loss" in line
    assert "left" not in line
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
