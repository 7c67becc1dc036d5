"""`ft-dist check --model` needs memory for the weights, not for training, and says so where even that is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ft_dist.model.tiny import make_tiny
from tests.conftest import ROOT


def start(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)


@pytest.mark.parametrize("stage", ["auto", "3"])
def test_an_engine_that_does_not_train_holds_the_weights_alone(stage: str, tmp_path: Path) -> None:
    """For training it held five times as much, with its fp32 weights and gradients."""
    make_tiny("tiny-llama", tmp_path)
    settings = ["method.kind=full", "model.dtype=bf16", f"engine.zero_stage={stage}", f"model.path={tmp_path}"]
    done = start("tests.run.proof.weights_only", "smoke", *settings)
    assert done.returncode == 0, done.stderr
    assert 1 <= float(done.stdout.splitlines()[-1]) < 1.01


def test_running_out_of_memory_is_one_line(tmp_path: Path) -> None:
    make_tiny("tiny-llama", tmp_path)
    wide = AutoConfig.from_pretrained(tmp_path, intermediate_size=1 << 18)
    AutoModelForCausalLM.from_config(wide, dtype=torch.bfloat16).save_pretrained(tmp_path)
    settings = ["method.kind=full", "model.dtype=fp32", f"model.path={tmp_path}", f"output_dir={tmp_path / 'run'}"]
    # 192 MiB of weights in the file, and 384 MiB in fp32
    done = start("tests.run.proof.limited_check", "500", "smoke", *settings)
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip().splitlines()[-1]
    assert line.startswith("model: not checked by --model: out of memory in one process")
    assert line.endswith("; a run checks loss, isolation and gradients itself when it starts")
    assert not (tmp_path / "run").exists()
