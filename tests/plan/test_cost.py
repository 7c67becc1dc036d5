"""Hours, price, and the commit interval."""

import math

import pytest

from ft_dist.config import load_config
from ft_dist.plan.cost import best_interval, epoch_tokens, lost_share, run_plan, spot_plan
from ft_dist.plan.report import Cluster
from tests.plan.shapes import LLAMA_8B, folder


@pytest.mark.parametrize("commit_s", [0.5, 10.0, 120.0])
@pytest.mark.parametrize("mean_h", [1.0, 8.0, 100.0])
def test_the_suggested_interval_loses_least(commit_s, mean_h):
    """Daly's estimate is within 1 % of the optimum of his full model."""
    mean_s = mean_h * 3600
    best = best_interval(commit_s, mean_s)
    least = min(lost_share(best * factor, commit_s, mean_s) for factor in (0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 2.0))
    assert lost_share(best, commit_s, mean_s) <= least * 1.01
    assert best == pytest.approx(math.sqrt(2 * commit_s * mean_s), rel=0.15)


def test_without_failures_only_commits_cost_time():
    assert lost_share(1000.0, 10.0, 1e12, 0.0) == pytest.approx(10 / 1010, rel=1e-3)


@pytest.fixture
def job(tmp_path):
    def make(*overrides, **cluster):
        config = load_config("llama3_8b_lora", [f"model.path={folder(LLAMA_8B, tmp_path / 'm')}", *overrides])
        return Cluster(**cluster).job(config)

    return make


def test_epochs_and_price(job):
    planned = job("optim.epochs=2", "batch.global_rows=16")
    run = run_plan(planned, 2.0, tokens=10 * planned.step_tokens, price=3.0)
    assert run is not None
    assert (run.steps, run.estimated) == (20, False)
    assert run.hours == pytest.approx(40 / 3600)
    assert run.cost == pytest.approx(run.hours * 3.0 * 8)


def test_the_length_of_local_data_is_estimated_and_bounded(job, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("x" * 4_000_000)
    planned = job(f"data.train={file}", "optim.epochs=1")
    assert epoch_tokens(planned.config) == 1_000_000
    run = run_plan(planned, 1.0, tokens=None, price=None)
    assert run is not None
    assert (run.steps, run.estimated, run.cost) == (math.ceil(1_000_000 / planned.step_tokens), True, None)
    limited = run_plan(job(f"data.train={file}", "optim.max_steps=3"), 1.0, tokens=None, price=None)
    assert limited is not None
    assert (limited.steps, limited.estimated) == (3, False)
    assert run_plan(job("data.train=s3://bucket/x"), 1.0, tokens=None, price=None) is None


def test_preemptions_cost_time_and_grow_with_the_nodes(job):
    one, four = job(nodes=1), job(nodes=4)
    run = run_plan(one, 2.0, tokens=10**8, price=1.0)
    assert run is not None
    spot = spot_plan(one, 2.0, run, preemptions=4.0)
    assert spot.hours is not None
    assert run.hours < spot.hours < 1.2 * run.hours
    assert spot.lost_share <= spot.lost_share_as_configured
    assert spot_plan(four, 2.0, run, preemptions=4.0).mean_time_between_s == spot.mean_time_between_s / 4
