"""Sends metrics to wandb and TensorBoard if the config asks for it. Rank 0 only."""

import secrets
from typing import Any, Protocol

from ft_dist.config.schema import RunConfig
from ft_dist.run_folder import RunFolder


class Tracker(Protocol):
    def log(self, record: dict[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """One wandb run per output_dir: its id is stored there, so that a resumed run continues it."""

    def __init__(self, config: RunConfig) -> None:
        import wandb

        run_id = wandb_run_id(config) or secrets.token_hex(4)
        keep_wandb_run_id(config, run_id)
        self.run = wandb.init(
            project=config.observe.wandb_project,
            name=config.observe.run_name or config.run_dir.name,
            id=run_id,
            resume="allow",
            mode=config.observe.wandb,
            dir=str(config.run_dir),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )

    def log(self, record: dict[str, Any], step: int) -> None:
        self.run.log({key: value for key, value in record.items() if key != "step"}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoardTracker:
    def __init__(self, config: RunConfig, *, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(RunFolder(config.run_dir).tensorboard), purge_step=resumed_step + 1)

    def log(self, record: dict[str, Any], step: int) -> None:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


def open_trackers(config: RunConfig, *, resumed_step: int) -> list[Tracker]:
    trackers: list[Tracker] = []
    if config.observe.wandb != "off":
        trackers.append(WandbTracker(config))
    if config.observe.tensorboard:
        trackers.append(TensorBoardTracker(config, resumed_step=resumed_step))
    return trackers


def wandb_run_id(config: RunConfig) -> str | None:
    """The id of this run at wandb, if it has one."""
    path = RunFolder(config.run_dir).wandb_run_id
    return path.read_text().strip() if path.exists() else None


def keep_wandb_run_id(config: RunConfig, run_id: str) -> None:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    RunFolder(config.run_dir).wandb_run_id.write_text(run_id)
