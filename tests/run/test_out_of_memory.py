"""A rank whose allocator really fails, because the test limits its address space during the run."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ft_dist.config import load_config
from ft_dist.distributed import World
from ft_dist.run.out_of_memory import rows_after_shortage
from tests.conftest import ROOT, SMALL_RUN, read_lines

# 48 rows of 512 tokens keep about 170 MiB for backward, 24 rows half of that
WIDE = [
    *SMALL_RUN,
    "method.kind=full",
    "data.train=emails/train.jsonl",
    "batch.global_rows=48",
    "batch.micro_rows=48",
    "data.packing=true",
    "optim.max_steps=2",
]


def rank(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_error_has_the_plan_and_the_allocator_report(tmp_path):
    done = rank("tests.plan.limited", "60", *WIDE, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for part in ("batch.micro_rows=48", "The allocator reports: ", "Planned: ", "These settings need less: "):
        assert part in done.stderr
    assert "batch.micro_rows=48" not in done.stderr.split("These settings need less: ")[1]


def test_the_next_start_takes_half_the_rows_of_the_same_batches(tmp_path):
    folder, plain = tmp_path / "run", tmp_path / "plain"
    halving = [*WIDE, "batch.halve_when_out_of_memory=true"]
    failed = rank("tests.plan.limited", "60", *halving, f"output_dir={folder}")
    assert failed.returncode == 1, failed.stderr[-2000:]
    assert "resumes from the last commit with batch.micro_rows=24" in failed.stderr
    assert json.loads((folder / "micro_rows.json").read_text()) == {"micro_rows": 24}

    done = rank("ft_dist.train", *halving, f"output_dir={folder}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "micro_rows: 24" in (folder / "config.yaml").read_text()
    assert rank("ft_dist.train", *WIDE, f"output_dir={plain}").returncode == 0
    assert (folder / "samples.jsonl").read_text() == (plain / "samples.jsonl").read_text()
    losses = [[line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (folder, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    summary = json.loads((plain / "summary.json").read_text())
    assert summary["step_s"] > 0
    assert summary["planned_step_s"] is None  # the planner does not know CPUs
    # the plan assumes rows of distinct tokens; the e-mails share their system prompt
    assert 0.9 < summary["planned_peak_bytes"] / summary["peak_memory_bytes"] < 1.6


@pytest.mark.parametrize(
    "text, rows", [('{"micro_rows": 3}', 3), ('{"micro_rows": 30}', 8), ("", 8), ("[", 8), ('{"micro_rows": 0}', 8)]
)
def test_a_damaged_note_of_an_earlier_shortage_is_ignored(tmp_path, text, rows):
    (tmp_path / "micro_rows.json").write_text(text)
    config = load_config(
        "smoke", ["batch.micro_rows=8", "batch.halve_when_out_of_memory=true", f"output_dir={tmp_path}"]
    )
    assert rows_after_shortage(config, World(0, 1, 0, 1, torch.device("cpu"))).batch.micro_rows == rows
