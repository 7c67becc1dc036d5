"""Profiles: what a cluster requires of every job, as YAML, shipped as an example or written by the user.

A profile is looked up as a path, then in ~/.config/ft_dist/profiles/ ($XDG_CONFIG_HOME is honoured), then among the
shipped ones. It contains no credentials: they come from the environment of the submitting shell or from the platform.
"""

import os
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from ft_dist.config.load import MAX_PROBLEMS
from ft_dist.config.yaml_text import read_yaml
from ft_dist.errors import ConfigError
from ft_dist.launcher.templates import template_folder
from ft_dist.method.section import Section
from ft_dist.outside import expand_home

CREDENTIAL = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
"""Matches names of variables whose values must not be written to a file"""


KubernetesName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=253)]


class SlurmProfile(Section):
    """Options of sbatch, under its own names: https://slurm.schedmd.com/sbatch.html."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = Field(
        default=None, description="Time limit of one start, such as 4:00:00; the job requeues itself"
    )
    cpus_per_node: PositiveInt | None = None
    memory_per_node: str | None = Field(default=None, description="Such as 200G; 0 takes all memory of a node")
    extra: list[Annotated[str, Field(pattern=r"^--?\w")]] = Field(
        default_factory=list, description="More sbatch options, such as --constraint=h100"
    )
    max_idle_requeues: Annotated[int, Field(ge=0)] = Field(
        default=5, description="The job ends after this many consecutive starts without a new commit"
    )


class SkyProfile(Section):
    """https://docs.skypilot.co/en/latest/reference/yaml-spec.html."""

    several_lines: ClassVar[tuple[str, ...]] = ("setup",)

    infra: str | None = Field(default=None, description="Such as aws/us-east-1; SkyPilot chooses if it is not set")
    use_spot: bool = True
    setup: str | None = Field(default=None, description="Shell commands that install ft_dist on a new machine")
    disk_gb: PositiveInt = 200


class KubernetesProfile(Section):
    """JobSet (jobset.x-k8s.io/v1alpha2) or Kubeflow's PyTorchJob (kubeflow.org/v1)."""

    kind: Literal["jobset", "pytorchjob"] = "jobset"
    namespace: KubernetesName = "default"
    secrets: list[KubernetesName] = Field(
        default_factory=list, description="Secrets whose keys become environment variables"
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        default=20, description="How often Kubernetes restarts the whole job"
    )


class Profile(Section):
    """One cluster. Settings for a single target are in the section of that name."""

    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    gpu: str | None = Field(default=None, description="The cluster's name for the GPU, such as h100 or H100")
    environment: dict[str, str] = Field(default_factory=dict)
    interface: str | None = Field(default=None, description="Network interface for NCCL and gloo, such as ib0 or eth")
    modules: list[str] = Field(default_factory=list, description="Environment modules to load, in this order")
    venv: str | None = Field(default=None, description="Folder of a virtual environment that every node sees")
    container: str | None = Field(default=None, description="Image: for pyxis on SLURM, for pods or VMs elsewhere")
    volumes: dict[str, str] = Field(
        default_factory=dict,
        description="Folder in the container -> host folder (SLURM), claim (Kubernetes) or volume (SkyPilot)",
    )
    slurm: SlurmProfile = Field(default_factory=SlurmProfile)
    sky: SkyProfile = Field(default_factory=SkyProfile)
    kubernetes: KubernetesProfile = Field(default_factory=KubernetesProfile)

    @field_validator("environment")
    @classmethod
    def _no_credentials(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(f"{name!r} is not a valid name of an environment variable")
            if CREDENTIAL.search(name):
                # the value may be the credential, so it is not printed
                raise ValueError(
                    f"{name} looks like a credential. Export it in the shell that submits, or keep it in the "
                    "platform's secrets"
                )
        return value

    @field_validator("volumes")
    @classmethod
    def _absolute(cls, value: dict[str, str]) -> dict[str, str]:
        for folder in value:
            if not folder.startswith("/"):
                raise ValueError(f"{folder!r} is not an absolute path")
        return value

    @model_validator(mode="after")
    def _one_python(self) -> "Profile":
        if self.venv and self.container:
            raise ValueError("venv and container are both set, but only one can provide the job's Python")
        return self

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of every worker."""
        network = {f"{library}_SOCKET_IFNAME": self.interface for library in ("NCCL", "GLOO")} if self.interface else {}
        return network | self.environment


def load_profile(name: str | None) -> Profile:
    """The profile of that name or path; the defaults for None. Raises ConfigError."""
    if name is None:
        return Profile()
    path = _find(name)
    content = read_yaml(path)
    try:
        return Profile.model_validate({} if content is None else content)
    except ValidationError as error:
        problems = [f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors()]
        raise ConfigError(f"{path}: {'; '.join(problems[:MAX_PROBLEMS])}.") from None


def _find(name: str) -> Path:
    path = expand_home(name, error=ConfigError)
    if path.is_file():
        return path
    own = expand_home(os.environ.get("XDG_CONFIG_HOME") or "~/.config", error=ConfigError) / "ft_dist" / "profiles"
    folders = (own, template_folder() / "profiles")
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise ConfigError(
        f"--profile {name}: no file and no profile has that name. Use one of {', '.join(known)}, or add it to {own}."
    )
