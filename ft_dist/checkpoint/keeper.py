"""A run's checkpoints: the commit it goes on from, the saves it makes, and what is told of them."""

from collections.abc import Mapping
from typing import Any

from ft_dist.checkpoint.commit.mirror import MIRROR_WAIT_S, Mirror
from ft_dist.checkpoint.commit.retention import Retention
from ft_dist.checkpoint.commit.writer import CheckpointWriter
from ft_dist.checkpoint.find import agreed_commit
from ft_dist.checkpoint.identity import check_identity, identity
from ft_dist.checkpoint.load import load
from ft_dist.config import RunConfig
from ft_dist.distributed import World, barrier
from ft_dist.engine.fragments import adam_step, owned_tensors
from ft_dist.engine.step import Engine
from ft_dist.observe.console import Console
from ft_dist.observe.recorder import Recorder
from ft_dist.storage import open_storage


class CheckpointKeeper:
    """One a rank; all ranks make it at the same point.

    `resumed` is the state to go on from, loaded into `engine` already, or None; `passed_over` and `changed` hold a line
    for each damaged commit and each changed key of the config.
    """

    def __init__(self, config: RunConfig, world: World, engine: Engine, *, folder: str) -> None:
        """`folder` holds the base model. Raises CheckpointError where what is found may not be gone on from."""
        self.root = config.run_dir / "checkpoints"
        self._world = world
        self._engine = engine
        self._identity = identity(config, folder=folder)
        self._interval = config.checkpoint.interval_steps
        self.saved_s = 0.0
        """How long the last save took until it was on disk; known to rank 0"""
        place = config.checkpoint.path
        note = Console(enabled=world.is_main).note
        limit = "the time for checkpoints"
        storage = open_storage(place, wait_s=MIRROR_WAIT_S, limit=limit, log=note) if place else None
        commit, self.passed_over = agreed_commit(
            world,
            resume=config.checkpoint.resume,
            root=self.root,
            storage=storage,
            timeout_s=config.engine.timeout_s,
        )
        self.resumed: dict[str, Any] | None = None
        self.changed: list[str] = []
        if commit:
            self.resumed = commit.state()
            if "config" in self.resumed:
                self.changed = check_identity(self.resumed, self._identity, where=commit.folder)
            load(engine, commit)
            barrier(world)
        retention = Retention.of(config.checkpoint)
        self.writer = CheckpointWriter(
            self.root,
            world,
            retention=retention,
            mirror=Mirror(storage, retention) if storage and world.is_main else None,
            timeout_s=config.engine.timeout_s,
        )

    def is_due(self, step: int) -> bool:
        return self._interval > 0 and step % self._interval == 0

    def save(self, state: dict[str, Any], *, held_out_losses: Mapping[int, float]) -> None:
        """Save the engine and `state` (its `step` names the commit). See `wait_until_copied` and `finish`."""
        whole = {
            **state,
            "adam_step": adam_step(self._engine),
            "parameters": self._engine.trainable_shapes(),
            "held_out_losses": dict(held_out_losses),
            "world_size": self._world.size,
            "zero_stage": self._engine.stage,
            **self._identity,
        }
        tensors = owned_tensors(self._engine)
        self.writer.save(tensors, step=state["step"], state=whole, held_out_losses=held_out_losses)

    def wait_until_copied(self) -> float:
        """Return when the engine may change what the last save saves; the seconds that it took."""
        return self.writer.wait_until_copied()

    def finish(self) -> None:
        """Return, on every rank, when the last save is a commit or has failed. A collective."""
        self.writer.wait()
        barrier(self._world)  # rank 0 seals: others may not leave, and end the job, before it has

    def is_committed(self, step: int) -> bool:
        return self.writer.is_committed(step)

    def tell(self, recorder: Recorder) -> None:
        """Record what happened since the last call."""
        for report in self.writer.reports():
            recorder.event(report.event, step=report.step, **report.fields)
            if report.event == "saved":
                self.saved_s = float(report.fields["seconds"])
            if report.note:
                recorder.console.note(report.note)

    def close(self) -> None:
        """Wait, for a bounded time, for what is being written and mirrored."""
        self.writer.close()
