"""The modules that a start loads."""

import subprocess
import sys

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
