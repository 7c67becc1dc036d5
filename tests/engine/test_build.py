"""The modules that a start loads, and what an architecture cannot do."""

import subprocess
import sys

import pytest
from torch import nn

from ft_dist.config import load_config
from ft_dist.engine.build import refuse_untrainable
from ft_dist.errors import ModelError
from tests.conftest import ROOT, SMALL_RUN
from tests.families.architectures import make


def test_a_run_does_not_load_the_compiler(tmp_path):
    """torch's Inductor costs every rank seconds of a start."""
    settings = [*SMALL_RUN, "optim.max_steps=1", f"output_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-X", "importtime", "-m", "ft_dist.train", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in imported
    assert "torch._inductor.compile_fx" not in imported


def test_blocks_that_cannot_be_recomputed_are_refused(cli, tmp_path):
    model = make("jetmoe", tmp_path / "model")
    settings = [f"model.path={model}", "method.kind=full", f"output_dir={tmp_path / 'run'}"]
    settings.append("engine.activation_checkpointing=true")
    for verb in ("check", "train"):
        done = cli(verb, *SMALL_RUN, *settings, "--nproc", "1")
        assert done.returncode == 2, done.stderr
        assert done.stderr.strip().splitlines()[-1] == (
            "ft-dist: error: engine.activation_checkpointing=true: JetMoeForCausalLM in transformers cannot recompute "
            "its blocks. Set engine.activation_checkpointing=false."
        )
        assert "Traceback" not in done.stderr


def test_a_model_of_which_nothing_trains_is_refused():
    config = load_config("smoke", ["method.kind=full"])
    model = nn.Linear(2, 2)
    refuse_untrainable(model, config)
    with pytest.raises(ModelError, match=r"method\.kind=full: leaves no parameter of model\.path=\S+ to train"):
        refuse_untrainable(model.requires_grad_(False), config)
