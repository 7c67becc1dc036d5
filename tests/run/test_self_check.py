"""The self-check catches what would train silently on something wrong, and names the part."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ft_dist.model.tiny import make_tiny
from tests.conftest import ROOT, read_lines

PLANTED = Path(__file__).with_name("planted.py")
SETTINGS = ["smoke", "model.dtype=fp32", "data.eval=[]", "optim.max_steps=1", "checkpoint.interval_steps=0"]


def run_with(fault: str, folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    # the cache of an earlier, faultless run must not answer
    place = {"PYTHONPATH": paths, "FT_DIST_CACHE": str(folder / "cache")}
    make_tiny("tiny-llama", folder / "model")
    command = [sys.executable, str(PLANTED), fault, *SETTINGS, f"model.path={folder / 'model'}"]
    command += [f"output_dir={folder / 'run'}", *settings]
    return subprocess.run(command, cwd=ROOT, env=os.environ | place, capture_output=True, text=True, timeout=300)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    return next(line for line in done.stderr.splitlines() if line.startswith("ft-dist: error"))


@pytest.mark.parametrize(
    "fault, named",
    [
        ("leaking_mask", "data.packing=true, but samples in one row change each other's loss"),
        ("halved_logits", "transformers' own forward of the same tokens"),
        ("wrong_norm", "transformers' own forward of the same tokens"),
        ("frozen_adapter", "q_proj.lora_B.default.weight: frozen, although method.kind=lora trains it"),
        ("unread_adapter", "no gradient reaches"),
    ],
)
def test_a_planted_fault_ends_the_run_before_its_first_step(fault: str, named: str, tmp_path: Path) -> None:
    done = run_with(fault, tmp_path, "data.packing=true")
    assert done.returncode == 2, done.stderr
    assert named in error_of(done)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_leak_gives_each_sample_a_row_unless_packing_is_set(tmp_path: Path) -> None:
    done = run_with("leaking_mask", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "each sample gets its own row" in done.stderr + done.stdout


def broken(folder: Path, change: Any) -> Path:
    make_tiny("tiny-llama", folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda w: {name: tensor for name, tensor in w.items() if ".layers.1." not in name},
            "no weights for model.layers.1.input_layernorm.weight",
        ),
        (lambda w: {f"other.{name}": tensor for name, tensor in w.items()}, "which no layer reads"),
        (
            lambda w: w | {"model.norm.weight": w["model.norm.weight"][:-1].contiguous()},
            "model.norm.weight has shape [63], but config.json makes it [64]",
        ),
        (
            lambda w: w | {"model.layers.0.self_attn.o_proj.bias": w["model.norm.weight"].clone()},
            "no layer reads model.layers.0.self_attn.o_proj.bias",
        ),
    ],
    ids=["missing layer", "foreign names", "other shape", "unread bias"],
)
def test_a_weight_that_is_not_read_or_not_there_is_refused(cli: Any, change: Any, named: str, tmp_path: Path) -> None:
    folder = broken(tmp_path / "model", change)
    errors = []
    for verb in ("check", "train"):
        done = cli(verb, *SETTINGS, f"model.path={folder}", f"output_dir={tmp_path / 'run'}")
        assert done.returncode == 2, done.stderr
        errors.append(error_of(done))
    assert named in errors[0]
    assert errors[0] == errors[1]


def test_a_part_that_text_models_do_not_have_is_reported(cli: Any, tmp_path: Path) -> None:
    extra = {"mtp.layers.0.norm.weight", "model.visual.blocks.0.norm.weight"}
    folder = broken(tmp_path / "model", lambda w: w | {name: w["model.norm.weight"].clone() for name in extra})
    done = cli("check", *SETTINGS, f"model.path={folder}", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "model: model.visual, mtp (2 tensors) are left out of training and of final/" in done.stdout


@pytest.mark.parametrize("stage, ranks", [(0, 1), (2, 2), (3, 2)])
def test_it_changes_no_step(cli: Any, stage: int, ranks: int, tmp_path: Path) -> None:
    """The first run measures, the second finds the result in the cache."""
    metrics = []
    for number in range(2):
        run = tmp_path / str(number)
        settings = [*SETTINGS, "optim.max_steps=3", f"engine.zero_stage={stage}", f"output_dir={run}"]
        done = cli("train", *settings, "--nproc", str(ranks), FT_DIST_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        assert ("self-check (cached)" if number else "self-check: loss") in done.stdout + done.stderr
        lines = read_lines(run / "metrics.jsonl")
        metrics.append([(line["loss"], line["grad_norm"]) for line in lines])
    assert metrics[0] == metrics[1]
