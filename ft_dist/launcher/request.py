"""What the user asked `ft-dist launch` for, and each run of it with its config pinned.

The nodes read `output_dir/launch/config.yaml`, the config as resolved at submission: editing the recipe while the job
is queued changes nothing.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ft_dist.config import RunConfig
from ft_dist.errors import ConfigError
from ft_dist.launcher.nodes import Nodes
from ft_dist.launcher.profiles import Profile
from ft_dist.outside import expand_home
from ft_dist.run_folder import RunFolder


@dataclass(frozen=True)
class Request:
    """One call of `ft-dist launch`. `rdzv` is HOST:PORT of the first node, for torchrun only."""

    recipe: str
    overrides: Sequence[str]
    target: str
    shares_disks: bool
    """The nodes see this machine's file system"""
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
        """The job's interpreter: the profile's, the container's, or this one if the nodes share our disks."""
        if self.profile.venv:
            return str(expand_home(self.profile.venv, error=ConfigError) / "bin" / "python")
        if self.profile.container:
            return "python"
        return sys.executable if self.shares_disks else "python3"

    @property
    def values(self) -> dict[str, Any]:
        """The values that every template may use."""
        names = ("nodes", "nproc", "gpus_per_node", "max_restarts", "profile", "python")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class RequestedRun:
    """One run of a request. `folder` is absolute and holds the submitted files; it is output_dir if the nodes share
    our disks."""

    folder: Path
    config: RunConfig
    overrides: list[str] = field(default_factory=list)

    @property
    def pinned(self) -> Path:
        return RunFolder(self.folder).launch / "config.yaml"


def job_name(folder: Path) -> str:
    """A name that every target accepts: at most 40 of a-z, 0-9 and -, starting with a letter (RFC 1035)."""
    name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    return f"ft-{name}"[:40].rstrip("-")
