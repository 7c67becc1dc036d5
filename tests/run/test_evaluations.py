"""When a run stops early: a function of the held-out losses."""

import math

import pytest

from ft_dist.checkpoint.state import RunState
from ft_dist.config.schema import EvaluateConfig
from ft_dist.run.evaluations import Evaluations


def after(losses: dict[int, float], patience: int | None = 2) -> Evaluations:
    evaluations = Evaluations(EvaluateConfig(interval_steps=5, patience=patience), None, None, None)  # type: ignore
    evaluations.losses = losses
    return evaluations


@pytest.mark.parametrize(
    "losses, best, stalled",
    [
        ({}, None, 0),
        ({0: 3.0}, 0, 0),
        ({0: 3.0, 5: 2.0, 10: 1.0}, 10, 0),
        ({0: 3.0, 5: 2.0, 10: 2.5}, 5, 1),
        ({0: 3.0, 5: 2.0, 10: 2.0}, 5, 1),  # equal is no improvement
        ({5: 2.0, 10: math.inf, 15: 2.1}, 5, 2),
        ({5: 2.0, 10: 2.5, 15: 1.9}, 15, 0),
        ({0: 1.0, 5: 2.0, 10: 1.5}, 0, 2),  # no better than before training
        ({5: math.inf, 10: math.inf}, None, 2),
    ],
)
def test_evaluations_without_a_new_lowest_loss_are_counted(losses, best, stalled):
    evaluations = after(losses)
    assert (evaluations.best_step, evaluations.stalled) == (best, stalled)
    assert evaluations.out_of_patience == (stalled >= 2)
    assert not after(losses, patience=None).out_of_patience


def test_a_loss_that_is_not_finite_survives_json():
    state = RunState(step=10, held_out_losses={5: 1.0, 10: math.inf})
    assert state.to_dict()["held_out_losses"] == {5: 1.0, 10: None}
    assert RunState.from_dict(state.to_dict()).held_out_losses == {5: 1.0, 10: math.inf}
