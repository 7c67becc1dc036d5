"""Resolve the options of `ft-dist launch` to a request, and the request to its runs: one per combination of a sweep."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from ft_dist.config import RunConfig, load_config
from ft_dist.errors import ConfigError, UserError
from ft_dist.launcher.machine import default_nproc
from ft_dist.launcher.nodes import parse_nodes
from ft_dist.launcher.profiles import load_profile
from ft_dist.launcher.request import Request, RequestedRun
from ft_dist.launcher.targets.table import find_target

MAX_SWEEP = 1000
"""SLURM's MaxArraySize is 1001 by default"""


def make_request(
    recipe: str,
    overrides: Sequence[str],
    *,
    target: str,
    nodes: str,
    gpus_per_node: int | None,
    nproc: int | None,
    profile: str | None,
    sweep: Sequence[str],
    rdzv: str | None,
    max_restarts: int,
) -> Request:
    """The options of `ft-dist launch`, with defaults from the profile and this machine. Raises UserError."""
    cluster = load_profile(profile)
    chosen = find_target(target)
    gpus = gpus_per_node if gpus_per_node is not None else cluster.gpus_per_node
    if gpus is None and not chosen.on_this_machine:
        raise UserError(
            f"--on {target} needs --gpus-per-node (0 trains on CPU), or a profile that names gpus_per_node."
        )
    if gpus is None:
        gpus = default_nproc()
    return Request(
        recipe=recipe,
        overrides=overrides,
        target=target,
        shares_disks=chosen.shares_disks,
        nodes=parse_nodes(nodes, option="--nodes"),
        nproc=nproc or max(1, gpus),
        gpus_per_node=gpus,
        profile=cluster,
        sweep=sweep,
        rdzv=rdzv,
        max_restarts=max_restarts,
    )


def requested_runs(request: Request) -> list[RequestedRun]:
    """The run, or one run per combination of the sweep, each in its own folder. Raises ConfigError, UserError."""
    base = load_config(request.recipe, request.overrides)
    if not request.sweep:
        overrides = list(request.overrides)
        if request.shares_disks:
            return [_pinned(base, overrides, Path(base.output_dir))]
        return [RequestedRun(_submission_folder(base).absolute(), base, overrides)]
    runs = []
    for index, combination in enumerate(_combinations(request.sweep)):
        overrides = [*request.overrides, *combination]
        name = re.sub(r"[^\w.=+-]+", "_", "_".join(combination))[:100]
        folder = Path(base.output_dir) / f"{index:03d}-{name}"
        config = load_config(request.recipe, overrides)
        if config.checkpoint.path:  # two runs in one mirror would resume from each other's commits
            config.checkpoint.path = f"{config.checkpoint.path.rstrip('/')}/{folder.name}"
        runs.append(_pinned(config, overrides, folder))
    return runs


def _submission_folder(config: RunConfig) -> Path:
    """Where this machine keeps the submission if the nodes do not share its disks. A relative output_dir is used here
    too; an absolute one is a path on the nodes."""
    folder = Path(config.output_dir)
    return Path("runs") / folder.name if folder.is_absolute() else folder


def _pinned(config: RunConfig, overrides: list[str], folder: Path) -> RequestedRun:
    folder = folder.absolute()
    return RequestedRun(folder, config.model_copy(update={"output_dir": str(folder)}), overrides)


def _combinations(sweep: Sequence[str]) -> list[tuple[str, ...]]:
    choices = []
    for entry in sweep:
        key, separator, values = entry.partition("=")
        if not separator or not key or not all(values.split(",")):
            raise UserError(f"--sweep {entry}: should be key=value,value, for example optim.lr=1e-4,2e-4.")
        if key in ("output_dir", "checkpoint.path"):
            raise UserError(f"--sweep {entry}: each run of a sweep already gets its own folder below {key}.")
        choices.append([f"{key}={value}" for value in values.split(",")])
    found = list(itertools.product(*choices))
    if len(found) > MAX_SWEEP:
        raise ConfigError(f"--sweep: {len(found)} runs, but a job array takes at most {MAX_SWEEP}. Sweep fewer values.")
    return found
