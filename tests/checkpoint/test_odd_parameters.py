"""Parameters without a gradient, tied weights and sizes that no world divides: at every ZeRO stage on 2 ranks, then
loaded at another stage on 3.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ft_dist.checkpoint.commit.format import commits
from ft_dist.checkpoint.load import SavedFragments
from tests.checkpoint.odd_ranks import HIDDEN, STAGES, VOCABULARY
from tests.conftest import ROOT
from tests.ports import free_port

KINDS = ("master", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    for what, size in (("train", 2), ("continue", 3)):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        place |= {"LOCAL_WORLD_SIZE": str(size), "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.checkpoint.odd_ranks", what, str(folder)],
                cwd=ROOT,
                env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
        outputs = [rank.communicate(timeout=900)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * size, outputs
    return folder


def state_of(root: Path, stage: int, steps: int) -> dict[tuple[str, str], torch.Tensor]:
    """Flat tensors by (kind, parameter) of a stage's commit after `steps`."""
    commit = next(commit for commit in commits(root) if commit.step == 10 * stage + steps)
    state = commit.state()
    assert state["adam_step"] == steps
    fragments, found = SavedFragments(commit.fragment_files()), {}
    for name, shape in state["parameters"].items():
        for kind in KINDS:
            found[kind, name] = torch.full((math.prod(shape),), torch.nan)
            assert fragments.copy_into(found[kind, name], kind, name, start=0) == math.prod(shape)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_is_saved_once_and_loaded_at_another_stage(trained, stage):
    saved, loaded = state_of(trained / "train", stage, 2), state_of(trained / "continue", stage, 2)
    names = {name for _, name in saved}
    assert names == {
        "embed.weight", "mix.weight", "mix.bias", "scale", "unused_first", "unused.weight", "unused.bias"
    }  # fmt: skip
    assert saved["master", "embed.weight"].numel() == VOCABULARY * HIDDEN
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    for name in names:
        assert bool(saved["exp_avg", name].any()) == bool(saved["exp_avg_sq", name].any()) == ("unused" not in name)


@pytest.mark.parametrize("stage", STAGES)
def test_it_continues_as_if_uninterrupted(trained, stage):
    """Up to the order of sums, which depends on the world; the reference is an uninterrupted run at stage 0."""
    truth = state_of(trained / "train", 0, 4)
    before = state_of(trained / "train", 0, 2)
    assert all((truth["master", name] != before["master", name]).any() for name in ("embed.weight", "unused.weight"))
    for run in ("train", "continue"):
        found = state_of(trained / run, stage, 4)
        for key, values in truth.items():
            torch.testing.assert_close(found[key], values, rtol=2e-6, atol=1e-6, msg=f"{run} {key}")
