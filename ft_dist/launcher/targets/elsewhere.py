"""What holds for machines that do not see this one's disks (SkyPilot, Kubernetes, a plain VM).

The recipe travels inside what is submitted, data and model have to be where those machines reach them, and commits
have to outlive the machine: checkpoint.path is a bucket, or output_dir lies on a volume.
"""

from pathlib import Path, PurePosixPath

from ft_dist.check import check
from ft_dist.config import RunConfig, dump_config, find_recipe, recipe_folder
from ft_dist.errors import ConfigError, UserError
from ft_dist.launcher.request import Request, Run
from ft_dist.storage import is_url

PORT = 29400
CREDENTIALS = ("HF_TOKEN", "WANDB_API_KEY")
"""Passed on by name where the platform can do that; it fills in the values from this shell"""


def only_run(request: Request, runs: list[Run]) -> Run:
    """The run, checked for what it meets elsewhere. Raises UserError, also for a sweep."""
    if len(runs) > 1:
        raise UserError(f"--sweep is for --on slurm, whose job arrays it becomes; here are {len(runs)} runs.")
    check_portable(request, runs[0])
    return runs[0]


def check_portable(request: Request, run: Run) -> None:
    """Raise ConfigError for what the other machines cannot reach or would lose; check the rest as ever."""
    config = run.config
    volumes = [PurePosixPath(folder) for folder in request.profile.volumes]
    on_volume = [path for path in _local_paths(config) if _below(path, volumes)]
    for path in _local_paths(config):
        if path not in on_volume and not _below(path, [PurePosixPath(recipe_folder())]):
            raise ConfigError(
                f"{path} is on this machine, which --on {request.target} does not see. Name a URL (`ft-dist prepare "
                "--to s3://...` writes data there), a hub id, or a folder below one of the profile's volumes."
            )
    kept = _below(config.output_dir, volumes)
    if request.nodes.most > 1 and not kept:
        raise ConfigError(
            f"output_dir={config.output_dir}: {request.nodes} nodes write one checkpoint, so it has to be a folder "
            "that all of them see, below one of the profile's volumes."
        )
    if not kept and not is_url(config.checkpoint.path or ""):
        raise ConfigError(
            f"checkpoint.path={config.checkpoint.path}: the machine's disk is lost with the machine. Set it to a URL "
            "such as s3://bucket/run, or put output_dir below one of the profile's volumes."
        )
    if not on_volume:
        check(config.model_copy(update={"output_dir": str(run.folder)}), world_size=request.world_size)


def embedded(request: Request, run: Run) -> str | None:
    """The config's text, to travel along; None for a shipped recipe, which is there already, with its data."""
    return None if find_recipe(request.recipe).parent == recipe_folder() else dump_config(run.config)


def arguments(request: Request, run: Run, *, config: str) -> list[str]:
    """What the agent is given: the shipped recipe by name, or the file `config` that travelled along."""
    shipped = embedded(request, run) is None
    return [find_recipe(request.recipe).stem, *run.overrides] if shipped else [config]


def _local_paths(config: RunConfig) -> list[str]:
    """Paths of data and model that are folders and files, not URLs, hub ids or built-in names."""
    sources = [source.path for source in (*config.data.train, *config.data.eval)]
    names = [name for name in (*sources, config.model.path, config.model.chat_template or "") if name]
    return [name for name in names if not is_url(name) and (name.startswith(("/", "~", ".")) or Path(name).exists())]


def _below(path: str, folders: list[PurePosixPath]) -> bool:
    return any(folder in (PurePosixPath(path), *PurePosixPath(path).parents) for folder in folders)
