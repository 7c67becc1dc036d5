"""The learning rate is a function of the step; weight decay skips vectors."""

import itertools

import pytest
import torch

from ft_dist.config.schema import OptimConfig
from ft_dist.optim.build import parameter_groups
from ft_dist.optim.schedule import learning_rate


def rates(total=100, **settings):
    optim = OptimConfig(lr=1.0, **settings)
    return [learning_rate(optim, step=step, total_steps=total) for step in range(1, total + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_to_the_peak_and_no_step_is_wasted(schedule):
    found = rates(schedule=schedule, warmup_steps=10)
    assert found[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert max(found) == found[10] == 1.0
    assert min(found) > 0
    assert all(later <= earlier for earlier, later in itertools.pairwise(found[10:]))


def test_shapes_of_the_schedules():
    assert rates(schedule="cosine")[50] == pytest.approx(0.5)
    assert rates(schedule="linear")[50] == pytest.approx(0.5)
    assert rates(schedule="constant")[-1] == 1.0
    held = rates(schedule="wsd", decay_steps=20)
    assert held[79] == held[80] == 1.0
    assert held[90] == pytest.approx(0.5)
    assert rates(schedule="cosine", min_lr_ratio=0.1)[-1] > 0.1


def test_weight_decay_reaches_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    decayed, spared = parameter_groups(model.named_parameters(), OptimConfig(weight_decay=0.1))
    assert [p.dim() for p in decayed["params"]] == [2]
    assert [p.dim() for p in spared["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
