"""Updates of bf16 models in a handful of operations, on one rank and on two, against plain PyTorch."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.checkpoint.odd_ranks import Objective, Odd
from tests.conftest import ROOT
from tests.engine.flat_ranks import DECAY, MAX_NORM, RATE, ROWS, TOKENS, micro_batches
from tests.ports import free_port

UPDATE_OPERATIONS = 20
"""Including collectives and the two operations that add up a micro-batch's gradients"""


@pytest.fixture(scope="module", params=[1, 2])
def seen(request: Any, tmp_path_factory: Any) -> dict[Any, Any]:
    """The results of rank 0 in a world of `ranks`; see flat_ranks.py."""
    out, size = tmp_path_factory.mktemp("flat") / "seen.pt", request.param
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    place |= {"LOCAL_WORLD_SIZE": str(size), "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.flat_ranks", str(out)],
            cwd=ROOT,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    output = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, output
    return {"ranks": size, **torch.load(out, weights_only=False)}


def plain_steps(max_norm: float) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Master weights after two steps of a plain loop with fp32 sums, and the norms before clipping."""
    torch.manual_seed(0)
    model = Odd().bfloat16()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float() for name, p in trained.items()}
    groups = [
        {"params": [m for m in masters.values() if (m.ndim > 1) == matrices], "weight_decay": DECAY * matrices}
        for matrices in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)
    norms = []
    for step in range(2):
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for batch in micro_batches(step):
            loss = Objective(model)(**batch.inputs()) / (2 * ROWS * TOKENS)
            grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            for master, grad in zip(masters.values(), grads, strict=True):
                master.grad += 0 if grad is None else grad.float()
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), max_norm)))
        optimizer.step()
        with torch.no_grad():
            for name, master in masters.items():
                trained[name].copy_(master)
    return masters, norms


@pytest.mark.parametrize("key, max_norm", [("two_steps", MAX_NORM), ("unclipped", math.inf)])
def test_steps_equal_plain_pytorch(seen, key, max_norm):
    """A rank of two holds half of the master weights."""
    masters, norms = plain_steps(max_norm)
    state, results = seen[key]
    assert [norm for _, norm in results] == pytest.approx(norms, rel=2e-6)
    assert all(norm > 2 * MAX_NORM for norm in norms), "nothing was clipped"
    held = 0
    for place, found in state.items():
        kind, name, start = place.replace("/", "@").split("@")
        if kind == "master":
            expected = masters[name].flatten()[int(start) : int(start) + len(found)]
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6, msg=place)
            held += len(found)
        if kind == "bf16":
            torch.testing.assert_close(found, masters[name].bfloat16(), rtol=2**-7, atol=1e-6, msg=place)
    total = sum(master.numel() for master in masters.values())
    assert abs(held - total / seen["ranks"]) < 4


@pytest.mark.parametrize("way", ["dummies", "pieces", "one_by_one"])
def test_no_bit_depends_on_how_gradients_are_gathered(seen, way):
    """All at once, in pieces or one by one; a micro-batch without labels changes nothing either."""
    (state, results), (other_state, other_results) = seen["two_steps"], seen[way]
    assert results == other_results
    assert state.keys() == other_state.keys()
    assert all(torch.equal(state[key], other_state[key]) for key in state)


@pytest.mark.parametrize("how", ["adamw", "adamw_8bit", "muon", "stage 2", "stage 3"])
def test_a_non_finite_step_changes_nothing(seen, how):
    """On every rank, weights, moments and step count stay, and the next step is the same as without it."""
    assert seen["spoilt", how] == {"skipped": True, "unchanged": True, "forgotten": True}


def test_weights_change_after_before_update_and_not_at_all_if_abandoned(seen):
    order = seen["order"]
    assert order["abandoned"]
    assert order["asked_before"]
    # a single rank is asked after the update, several ranks before it
    assert order["sums"] == ([2.0, 1.0, 0.0] if seen["ranks"] == 1 else [4.0, 0.0, 0.0])


def test_an_update_takes_few_operations_for_any_number_of_tensors(seen):
    counts = seen["counts", 1]
    assert counts["add_gradients"] == 2
    assert sum(counts.values()) <= UPDATE_OPERATIONS, counts


@pytest.mark.parametrize("stage, alone, together", [(2, 80, 80), (3, 80, 300)])
def test_updates_of_deepspeed_compute_one_norm(seen, stage, alone, together):
    """For 203 tensors; DeepSpeed alone takes 3,118 and 451 operations. On several ranks, stage 3 copies each small
    tensor once."""
    assert seen["counts", stage]["_update"] < (alone if seen["ranks"] == 1 else together)
