"""engine.verify_steps: one changed bit on one rank ends the run on all ranks, before anything of it is committed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ft_dist.checkpoint.commit.format import commits
from ft_dist.config import load_config
from ft_dist.engine.replicas import PART, sum_of_bits
from ft_dist.errors import ConfigError
from tests.conftest import ROOT, SMALL_RUN
from tests.ports import free_port

RUN = [*SMALL_RUN, "evaluate.before=false", "checkpoint.interval_steps=2", "optim.max_steps=6"]


def run_ranks(size: int, *arguments: str, **environment: str) -> tuple[list[int], str]:
    """Exit codes, and the output of rank 0."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    place |= {"LOCAL_WORLD_SIZE": str(size), "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"} | environment
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.replica_ranks", *arguments],
            cwd=ROOT,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    output = [rank.communicate(timeout=300)[0] for rank in ranks]
    return [rank.returncode for rank in ranks], output[0]


def steps(folder: Path) -> list[int]:
    return [commit.step for commit in commits(folder / "checkpoints")]


@pytest.mark.faults
@pytest.mark.parametrize(
    "settings, step",
    [
        (["engine.verify_steps=1", "engine.zero_stage=2"], 3),
        # the base's weights stay changed, and a commit is compared too
        (["engine.verify_steps=100", "engine.zero_stage=1", "model.dtype=bf16"], 4),
    ],
)
def test_the_rank_that_differs_is_named(tmp_path, settings, step):
    codes, output = run_ranks(3, "1", "3", *RUN, *settings, f"output_dir={tmp_path}")
    assert codes == [1, 1, 1], output
    assert f"step {step}: the weights of rank 1 on " in output
    assert "differ from those of the other 2 ranks (engine.verify_steps)" in output
    assert "Traceback" not in output
    assert steps(tmp_path) == [2]


@pytest.mark.faults
def test_two_ranks_cannot_tell_which_is_right(tmp_path):
    full = ["method.kind=full", "engine.zero_stage=0", "engine.verify_steps=3", f"output_dir={tmp_path}"]
    codes, output = run_ranks(2, "0", "3", *RUN, *full, FT_DIST_TEST_TRAINED="1")
    assert codes == [1, 1], output
    assert "step 3: the weights differ between ranks: rank 0 on " in output
    assert steps(tmp_path) == [2]


@pytest.mark.faults
def test_copies_that_are_equal_pass_and_nothing_is_compared_by_default(tmp_path):
    codes, output = run_ranks(2, "9", "9", *RUN, "engine.verify_steps=1", f"output_dir={tmp_path / 'equal'}")
    assert codes == [0, 0], output
    codes, output = run_ranks(2, "1", "3", *RUN, f"output_dir={tmp_path / 'default'}")
    assert codes == [0, 0], output


def test_stage_3_has_nothing_to_compare():
    with pytest.raises(ConfigError, match="verify_steps=5 needs zero_stage=auto, 0, 1 or 2"):
        load_config("smoke", ["engine.verify_steps=5", "engine.zero_stage=3"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_every_bit_counts_in_a_sum_on_a_device(dtype):
    tensor = torch.randn(2 * PART + 5).to(dtype)
    bits = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
    before = sum_of_bits(tensor)
    for place in (0, PART, len(tensor) - 1):
        for bit in range(8 * tensor.element_size() - 1):
            bits[place] ^= 1 << bit
            assert sum_of_bits(tensor) != before
            bits[place] ^= 1 << bit
    assert sum_of_bits(bits.flip(0).view(dtype)) != before
    assert sum_of_bits(tensor) == before
    assert sum_of_bits(torch.empty(0, 3, dtype=dtype)) == 0
