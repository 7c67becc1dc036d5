"""Every kernel compiles for every chip, within its shared memory and without spills."""

import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import ft_dist_kernels
import pytest
from ft_dist_kernels.aot import CHIPS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def resources(*arguments, module="resources", **variables):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", f"benchmarks.kernels.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("form", ["--quick", pytest.param("", marks=pytest.mark.slow)])
def test_every_kernel_fits_every_chip(tmp_path, form):
    result = resources("--json", str(tmp_path / "resources.json"), *form.split())
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    rows = json.loads((tmp_path / "resources.json").read_text())
    prefix = "ft_dist_kernels."
    modules = {info.name.removeprefix(prefix) for info in pkgutil.walk_packages(ft_dist_kernels.__path__, prefix)}
    with_kernels = {re.sub("[._]kernels$", "", name) for name in modules if name.endswith("kernels")}
    with_kernels -= {"dropout"}  # functions called by kernels, not kernels
    without = {("quantised.fp8", "sm_80"), ("quantised.fp8", "gfx942")}  # these chips lack this kind of e4m3
    assert {(row["op"], row["chip"]) for row in rows} >= {(op, chip) for op in with_kernels for chip in CHIPS} - without
    assert all(row["registers"] > 0 and row["spill_bytes"] == 0 and not row["problem"] for row in rows)
    # A size that bounds a tile's columns but is excluded from specialisation splits its loads into single elements;
    # a tile with as many elements as threads needs one such load
    lora = [row for row in rows if row["op"].startswith("lora") and "rank 8" not in row["kernel"]]
    assert [row for row in lora if row["narrow_loads"] > 1] == []


def test_every_kernel_compiles_if_an_argument_is_one():
    """Triton turns an integer equal to 1 into a constant: one token, rank 1, one output."""
    result = resources(module="ones")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_refuses_the_interpreter_and_unknown_ops():
    assert "Unset it" in resources(TRITON_INTERPRET="1").stderr
    unknown = resources("--ops", "softmax")
    assert unknown.returncode == 2
    assert "lora.extended" in unknown.stderr
