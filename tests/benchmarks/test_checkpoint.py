"""The comparison of saves runs with this version of the trainer, DeepSpeed and torch."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.faults
def test_all_three_save_and_load(tmp_path):
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--model", "tiny-llama", "--methods", "lora"]
    options = ["--rounds", "1", "--folder", str(tmp_path), "--json", str(tmp_path / "result.json")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: a target of time was missed on this machine
    sides = json.loads((tmp_path / "result.json").read_text())["lora"]["sides"]
    assert {"ours", "deepspeed", "dcp"} == set(sides), done.stderr
    assert all(side["bytes"] > 0 for side in sides.values())
