"""Fixtures for the whole suite: one cache for models and tokenised data, and real `ft-dist` processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# set before any test imports ft_dist, so that tests share one cache and do not touch the user's
os.environ["FT_DIST_CACHE"] = os.environ.get("FT_DIST_TEST_CACHE", str(ROOT / ".cache"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# several ranks share few cores; with more threads than cores, every collective waits
os.environ.setdefault("OMP_NUM_THREADS", "1")

CLI = [sys.executable, "-m", "ft_dist.cli"]


def start_cli(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start `ft-dist ARGUMENTS` as a process, output captured as text."""
    return subprocess.Popen(
        [*CLI, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `ft-dist ARGUMENTS` and wait until it ends."""

    def run(*arguments: str, timeout_s: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        with start_cli(*arguments, **environment) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# the smallest useful run: ten steps of the smoke recipe, without evaluation, saved only at the end
SMALL_RUN = [
    "smoke",
    "model.dtype=fp32",
    "data.eval=[]",
    "data.packing=false",
    "data.log_samples=true",
    "batch.global_rows=6",
    "optim.max_steps=10",
    "checkpoint.interval_steps=0",
]
