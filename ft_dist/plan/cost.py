"""Hours and price of a run from the time of a step, with the preemptions of spot machines."""

import math
from dataclasses import dataclass
from pathlib import Path

from ft_dist.config.schema import RunConfig
from ft_dist.plan.job import Job
from ft_dist.plan.memory.states import moment_bytes
from ft_dist.storage import is_url

BYTES_A_TOKEN = 4.0
"""Bytes per token of English text with a vocabulary of 32 thousand or more"""
SNAPSHOT_BYTES_S = 20e9
"""Bytes per second from a GPU to pinned host memory, the copy during which a commit stalls training"""
RESTART_S = 180.0
"""Seconds until a new machine has started, imported, loaded the model and the newest commit, and reached its first
step"""


@dataclass(frozen=True)
class RunPlan:
    """`hours` and `cost` without preemptions; None if the length of the run or the price is unknown."""

    steps: int
    tokens: int
    estimated: bool
    hours: float
    cost: float | None


@dataclass(frozen=True)
class SpotPlan:
    """A run with preemptions at a given rate and a commit every `interval_steps`."""

    mean_time_between_s: float
    commit_s: float
    best_interval_s: float
    best_interval_steps: int
    lost_share: float
    lost_share_as_configured: float
    hours: float | None
    cost: float | None


def epoch_tokens(config: RunConfig) -> int | None:
    """Tokens of data.train if it is in local files: about a quarter of its bytes; otherwise None."""
    total = 0
    for source in config.data.train:
        path = Path(source.path)
        if is_url(source.path) or source.live or not path.exists():
            return None
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        total += int(sum(file.stat().st_size for file in files) / BYTES_A_TOKEN * source.weight)
    return total


def run_plan(job: Job, step_s: float, *, tokens: int | None, price: float | None) -> RunPlan | None:
    """`tokens` per epoch, or None to estimate them from local files; `price` per GPU hour. None if the length of the
    run is unknown."""
    config = job.config
    known = tokens if tokens is not None else epoch_tokens(config)
    epochs = config.optim.most_epochs
    steps = None if known is None or epochs is None else math.ceil(known / job.step_tokens) * epochs
    limit = config.optim.max_steps
    if limit is not None:
        steps = limit if steps is None else min(steps, limit)
    if steps is None:
        return None
    hours = steps * step_s / 3600
    cost = None if price is None else hours * price * job.ranks
    return RunPlan(steps, steps * job.step_tokens, tokens is None and steps != limit, hours, cost)


def commit_seconds(job: Job) -> float:
    """Seconds that a commit stalls training: the copy of a rank's state, which is then written in the background."""
    own = job.trainable / job.ranks
    return (own * 4 + moment_bytes(job, own)) / SNAPSHOT_BYTES_S


def best_interval(commit_s: float, mean_time_s: float) -> float:
    """The commit interval in seconds that loses the least time: Young (1974), with the higher-order terms of Daly
    (2006), https://doi.org/10.1016/j.future.2004.11.016. If a commit takes more than half the mean time between
    failures, the interval is that mean time."""
    if commit_s >= mean_time_s / 2:
        return mean_time_s
    ratio = commit_s / (2 * mean_time_s)
    return math.sqrt(2 * commit_s * mean_time_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - commit_s


def lost_share(interval_s: float, commit_s: float, mean_time_s: float, restart_s: float = RESTART_S) -> float:
    """Share of wall time lost to commits, repeated work and restarts: Daly's full model of exponential failures."""
    work = interval_s / mean_time_s
    wall = mean_time_s * math.exp(restart_s / mean_time_s) * math.expm1((interval_s + commit_s) / mean_time_s)
    return 1 - (work * mean_time_s) / wall


def spot_plan(job: Job, step_s: float, run: RunPlan | None, *, preemptions: float) -> SpotPlan:
    """`preemptions` per node and day; the preemption of any node interrupts all."""
    nodes = -(-job.ranks // job.ranks_per_node)
    mean = 86400 / (preemptions * nodes)
    commit = commit_seconds(job)
    interval = max(best_interval(commit, mean), step_s)
    steps = max(1, round(interval / step_s))
    lost = lost_share(steps * step_s, commit, mean)
    configured = job.config.checkpoint.interval_steps or (run.steps if run else steps)
    hours = run.hours / (1 - lost) if run else None
    cost = run.cost / (1 - lost) if run and run.cost is not None else None
    as_configured = lost_share(configured * step_s, commit, mean)
    return SpotPlan(mean, commit, interval, steps, lost, as_configured, hours, cost)
