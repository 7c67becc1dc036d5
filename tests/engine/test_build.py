"""The modules that a start loads."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT, SMALL_RUN


def test_a_run_does_not_load_the_compiler(tmp_path):
    """torch's Inductor costs every rank seconds of a start."""
    settings = [*SMALL_RUN, "optim.max_steps=1", f"output_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-X", "importtime", "-m", "ft_dist.train", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in imported
    assert "torch._inductor.compile_fx" not in imported


def test_dora_starts_from_whole_weights_at_stage_3(cli, tmp_path):
    """Its magnitudes are norms of the weights, which ZeRO-3 has partitioned by then."""
    losses = []
    for stage, ranks in ((0, "1"), (3, "2")):
        run = tmp_path / str(stage)
        options = ["method.dora=true", f"engine.zero_stage={stage}", "optim.max_steps=2", "evaluate.before=false"]
        done = cli("train", "smoke", "model.dtype=fp32", *options, f"output_dir={run}", "--nproc", ranks)
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in read_lines(run / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
