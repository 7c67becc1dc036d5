"""A weight that no forward pass uses has no gradient; every stage treats it the same way."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, SMALL_RUN


def test_it_decays_the_same_at_every_stage(tmp_path):
    """Stage 0 gives torch's AdamW the parameters themselves, and it skips those without a gradient; DeepSpeed's shards
    always have one."""
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
