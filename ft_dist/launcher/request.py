"""What a user asked `ft-dist launch` for, checked, and each run of it with its config pinned.

The nodes read `output_dir/launch/config.yaml`, the resolved config of the moment of submission: a recipe that is
edited while the job waits in a queue changes nothing.
"""

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ft_dist.config import RunConfig, load_config
from ft_dist.errors import ConfigError, UserError
from ft_dist.launcher.local import default_nproc
from ft_dist.launcher.nodes import Nodes, parse_nodes
from ft_dist.launcher.profiles import Profile, load_profile

SEES_OUR_DISKS = ("local", "torchrun", "slurm")
MAX_SWEEP = 1000
"""SLURM's MaxArraySize is 1001 by default"""


@dataclass(frozen=True)
class Request:
    """One call of `ft-dist launch`. `rdzv` is HOST:PORT of the first node, for torchrun alone."""

    recipe: str
    overrides: Sequence[str]
    target: str
    nodes: Nodes
    nproc: int
    gpus_per_node: int
    profile: Profile
    sweep: Sequence[str] = ()
    rdzv: str | None = None
    max_restarts: int = 3

    @property
    def world_size(self) -> int:
        return self.nodes.most * self.nproc

    @property
    def python(self) -> str:
        """The interpreter of the job: the profile's, the container's, or this one where the nodes see our disks."""
        if self.profile.venv:
            return str(Path(self.profile.venv).expanduser() / "bin" / "python")
        if self.profile.container:
            return "python"
        return sys.executable if self.target in SEES_OUR_DISKS else "python3"

    @property
    def values(self) -> dict[str, Any]:
        """What every template may name."""
        names = ("nodes", "nproc", "gpus_per_node", "max_restarts", "profile", "python")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Run:
    """One run of a request. `folder`, absolute, holds what is submitted; where the nodes see it, it is output_dir."""

    folder: Path
    config: RunConfig
    overrides: list[str] = field(default_factory=list)

    @property
    def pinned(self) -> Path:
        return self.folder / "launch" / "config.yaml"


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
    """The arguments of `ft-dist launch`, with what the profile and this machine say. Raises UserError."""
    cluster = load_profile(profile)
    here = target in ("local", "torchrun")
    gpus = gpus_per_node if gpus_per_node is not None else cluster.gpus_per_node
    if gpus is None and not here:
        raise UserError(
            f"--on {target} needs --gpus-per-node (0 trains on CPU), or a profile that names gpus_per_node."
        )
    if gpus is None:
        gpus = default_nproc()
    return Request(
        recipe=recipe,
        overrides=overrides,
        target=target,
        nodes=parse_nodes(nodes, option="--nodes"),
        nproc=nproc or max(1, gpus),
        gpus_per_node=gpus,
        profile=cluster,
        sweep=sweep,
        rdzv=rdzv,
        max_restarts=max_restarts,
    )


def job_name(folder: Path) -> str:
    """A name that every target takes: at most 40 of a-z, 0-9 and -, starting with a letter (RFC 1035)."""
    name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    return f"ft-{name}"[:40].rstrip("-")


def runs_of(request: Request) -> list[Run]:
    """The run, or one run each combination of the sweep, in folders of their own. Raises ConfigError, UserError."""
    base = load_config(request.recipe, request.overrides)
    if request.target not in SEES_OUR_DISKS and not request.sweep:
        return [Run(_here(base).absolute(), base, list(request.overrides))]
    if not request.sweep:
        return [_pinned(base, list(request.overrides), Path(base.output_dir))]
    runs = []
    for index, combination in enumerate(_combinations(request.sweep)):
        overrides = [*request.overrides, *combination]
        name = re.sub(r"[^\w.=+-]+", "_", "_".join(combination))[:100]
        folder = Path(base.output_dir) / f"{index:03d}-{name}"
        runs.append(_pinned(load_config(request.recipe, overrides), overrides, folder))
    return runs


def _here(config: RunConfig) -> Path:
    """For machines that do not see our disks: output_dir if it is relative, and so may be meant for here as well."""
    folder = Path(config.output_dir)
    return Path("runs") / folder.name if folder.is_absolute() else folder


def _pinned(config: RunConfig, overrides: list[str], folder: Path) -> Run:
    folder = folder.absolute()
    return Run(folder, config.model_copy(update={"output_dir": str(folder)}), overrides)


def _combinations(sweep: Sequence[str]) -> list[tuple[str, ...]]:
    choices = []
    for entry in sweep:
        key, separator, values = entry.partition("=")
        if not separator or not key or not all(values.split(",")):
            raise UserError(f"--sweep {entry}: should be key=value,value, for example optim.lr=1e-4,2e-4.")
        if key == "output_dir":
            raise UserError(f"--sweep {entry}: every run of a sweep has a folder of its own below output_dir already.")
        choices.append([f"{key}={value}" for value in values.split(",")])
    found = list(itertools.product(*choices))
    if len(found) > MAX_SWEEP:
        raise ConfigError(
            f"--sweep: {len(found)} runs, but one job array takes at most {MAX_SWEEP}. Sweep fewer values."
        )
    return found
