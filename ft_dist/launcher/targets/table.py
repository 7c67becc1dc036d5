"""The targets of `ft-dist launch --on`. Each is imported when it is used, so that `ft-dist --help` stays fast."""

from importlib import import_module
from typing import TYPE_CHECKING

from ft_dist.errors import UserError

if TYPE_CHECKING:
    from ft_dist.launcher.targets.protocol import Target

TARGETS = {
    "local": "local:Local",
    "torchrun": "local:Torchrun",
    "slurm": "slurm:Slurm",
    "sky": "sky:Sky",
    "k8s": "kubernetes:Kubernetes",
    "vm": "vm:VirtualMachine",
}
"""Name -> file in this folder and class in it"""


def find_target(name: str) -> "Target":
    if name not in TARGETS:
        raise UserError(f"launch.json: target={name}, which is not one of {', '.join(TARGETS)}. Launch the run again.")
    module, _, target = TARGETS[name].partition(":")
    found: Target = getattr(import_module(f"{__package__}.{module}"), target)()
    return found
