"""A weight that no forward reaches has no gradient; every stage treats it alike."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, SMALL_RUN


def test_it_decays_as_it_does_in_shares(tmp_path):
    """Stage 0 hands torch's AdamW the parameters themselves, which skips those without a gradient; DeepSpeed's shares
    are whole."""
    after = {}
    for stage in (0, 2):
        out = tmp_path / f"{stage}.json"
        settings = ["method.kind=full", "optim.weight_decay=0.1", "optim.max_steps=2", "optim.lr=0.01"]
        place = [f"engine.zero_stage={stage}", f"output_dir={tmp_path / str(stage)}"]
        command = [sys.executable, "-m", "tests.engine.with_an_unused_parameter", str(out), *SMALL_RUN]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        done = subprocess.run(
            [*command, *settings, *place],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": paths},
        )
        assert done.returncode == 0, done.stderr
        after[stage] = json.loads(out.read_text())
    assert after[0][1] == pytest.approx(after[2][1], rel=1e-6)
    assert all(value < 1 for value in after[0][1])
