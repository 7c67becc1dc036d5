"""Code shared by the targets whose machines do not see this machine's disks (SkyPilot, Kubernetes, a plain VM).

The submission contains the recipe, those machines must be able to reach data and model, and commits must outlive the
machine: checkpoint.path is a bucket, or output_dir is on a volume.
"""

from pathlib import Path, PurePosixPath

from ft_dist.check import check, check_method
from ft_dist.config import RunConfig, dump_config, find_recipe, recipe_folder
from ft_dist.errors import ConfigError, UserError
from ft_dist.launcher.request import Request, RequestedRun
from ft_dist.storage import is_url

RENDEZVOUS_PORT = 29400
CREDENTIALS = ("HF_TOKEN", "WANDB_API_KEY")
"""Passed on by name if the platform can do that; it reads the values from this shell"""


def checked_run(request: Request, runs: list[RequestedRun]) -> RequestedRun:
    """The one run, checked against what remote machines can reach. Raises UserError, also for a sweep."""
    if len(runs) > 1:
        raise UserError(f"--sweep gives {len(runs)} runs, but --on {request.target} takes one. Use --on slurm.")
    check_portable(request, runs[0])
    return runs[0]


def check_portable(request: Request, run: RequestedRun) -> None:
    """Raise ConfigError for what the machines cannot reach or would lose; then run the usual checks."""
    config = run.config
    volumes = [PurePosixPath(folder) for folder in request.profile.volumes]
    on_volume = [path for path in _local_paths(config) if _below(path, volumes)]
    for path in _local_paths(config):
        if path not in on_volume and not _below(path, [PurePosixPath(recipe_folder())]):
            raise ConfigError(
                f"{path} is on this machine, which --on {request.target} does not see. Name a URL (`ft-dist prepare "
                "--to s3://...` writes data there), a hub id, or a folder below one of the profile's volumes."
            )
    persistent = _below(config.output_dir, volumes)
    if request.nodes.most > 1 and not persistent:
        raise ConfigError(
            f"output_dir={config.output_dir}: {request.nodes} nodes write one checkpoint, so it must be a folder that "
            "all of them see, below one of the profile's volumes."
        )
    if not persistent and not is_url(config.checkpoint.path or ""):
        raise ConfigError(
            f"checkpoint.path={config.checkpoint.path}: the machine's disk is lost with the machine. Set it to a URL "
            "such as s3://bucket/run, or put output_dir below one of the profile's volumes."
        )
    if not on_volume:
        check(config.model_copy(update={"output_dir": str(run.folder)}), world_size=request.world_size)
        check_method(config)


def embedded_config(request: Request, run: RequestedRun) -> str | None:
    """The config to embed in the submission; None for a shipped recipe, which is installed there with its data."""
    return None if find_recipe(request.recipe).parent == recipe_folder() else dump_config(run.config)


def agent_arguments(request: Request, run: RequestedRun, *, config: str) -> list[str]:
    """The agent's CONFIG and overrides: the name of a shipped recipe, or `config`, where the embedded file will be."""
    shipped = embedded_config(request, run) is None
    return [find_recipe(request.recipe).stem, *run.overrides] if shipped else [config]


def _local_paths(config: RunConfig) -> list[str]:
    """Paths of data and model that are folders and files, not URLs, hub ids or built-in names."""
    sources = [source.path for source in (*config.data.train, *config.data.eval)]
    names = [name for name in (*sources, config.model.path, config.model.chat_template or "") if name]
    return [name for name in names if not is_url(name) and (name.startswith(("/", "~", ".")) or Path(name).exists())]


def _below(path: str, folders: list[PurePosixPath]) -> bool:
    return any(folder in (PurePosixPath(path), *PurePosixPath(path).parents) for folder in folders)
