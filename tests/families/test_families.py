"""A short form of `make families`: one architecture of each kind that needs its own treatment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SHORT = {
    "gpt_oss": "builds its mask without positions, experts, sinks",
    "bloom": "ALiBi, no block masks",
    "falcon_h1": "recurrent; scales its logits with lm_head_multiplier",
    "recurrent_gemma": "recurrent; caps its logits",
    "hyperclovax": "multiplies its logits",
    "gemma4_text": "buffers, shared keys and values",
    "deepseek_v3": "latent attention, a correction bias",
    "bert": "not causal",
}


def test_no_architecture_is_silently_wrong(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.families", *SHORT],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in SHORT:
        assert done.stdout.count(f"\n{name} ") == 2, done.stdout


def test_a_wrong_row_fails() -> None:
    from tests.families.row import Row

    row = Row("some", "lora")
    row.compare("loss", 2.0001, 2.0)
    assert not row.right
    assert Row("some", "lora").right


@pytest.mark.slow
def test_every_architecture() -> None:
    assert subprocess.run([sys.executable, "-m", "tests.families"], cwd=ROOT).returncode == 0
