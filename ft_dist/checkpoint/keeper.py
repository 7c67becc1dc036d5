"""A run's checkpoints: the commit it resumes from, its saves, and the record of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from ft_dist.checkpoint.agreed import agreed_base, agreed_best, as_answer, of_answer
from ft_dist.checkpoint.commit.format import STATE
from ft_dist.checkpoint.commit.lease import Lease
from ft_dist.checkpoint.commit.mirror import MIRROR_WAIT_S, Mirror
from ft_dist.checkpoint.commit.retention import Retention
from ft_dist.checkpoint.commit.writer import CheckpointWriter
from ft_dist.checkpoint.find import find
from ft_dist.checkpoint.identity import check_identity, identity, keep_length
from ft_dist.checkpoint.load import load
from ft_dist.checkpoint.run_record import RunRecord, claim, write_record
from ft_dist.checkpoint.state import BaseRecord, RunState
from ft_dist.config import RunConfig
from ft_dist.distributed import World, barrier, decided
from ft_dist.engine.fragments import adam_step, owned_tensors
from ft_dist.engine.step import Engine
from ft_dist.errors import NEW_RUN, CheckpointError
from ft_dist.observe.console import Console
from ft_dist.observe.recorder import Recorder
from ft_dist.run_folder import RunFolder
from ft_dist.storage import open_storage


class CheckpointKeeper:
    """One per rank; all ranks create it at the same point.

    `resumed` is the state to resume from, already loaded into `engine`, or None. `skipped` has one line per damaged
    commit, `changed` one line per changed key of the config.
    """

    def __init__(self, config: RunConfig, world: World, engine: Engine, *, folder: str) -> None:
        """`folder` holds the base model. Raises CheckpointError if the run may not resume from the commit found."""
        self.root = RunFolder(config.run_dir).checkpoints
        self._world = world
        self._engine = engine
        self._interval = config.checkpoint.interval_steps
        self.saved_s = 0.0
        """Seconds until the last save was on disk; set on rank 0 only"""
        self.saved_at = time.monotonic()
        """When that was, or when the run started"""
        place, timeout_s = config.checkpoint.path, config.engine.timeout_s
        note = Console(enabled=world.is_main).note
        limit = "the time limit for checkpoints"
        self._storage = open_storage(place, wait_s=MIRROR_WAIT_S, limit=limit, log=note) if place else None
        self._timeout_s = timeout_s
        self._lease: Lease | None = None
        answer = decided(world, "checkpoint/resume", lambda: self._claim_and_find(config, note), timeout_s=timeout_s)
        self._run_id: str = answer["run_id"]
        commit, self.skipped = of_answer(answer), answer["skipped"]
        self.resumed = RunState.from_dict(commit.state(), where=commit.folder / STATE) if commit else None
        if self.resumed:
            keep_length(config, self.resumed.config)
        self._identity = identity(config, base=agreed_base(config, world, folder=folder))
        self.changed: list[str] = []
        if commit and self.resumed:
            if self.resumed.config is not None:
                self.changed = check_identity(self.resumed.identity, self._identity, where=commit.folder)
            load(engine, commit)
            barrier(world)
        record = RunRecord(id=self._run_id, model_path=config.model.path, model_commit=self.base.commit)
        folder_of_run = RunFolder(config.run_dir)
        decided(world, "checkpoint/record", lambda: write_record(folder_of_run, record), timeout_s=timeout_s)
        retention = Retention.of(config)
        self.writer = CheckpointWriter(
            self.root,
            world,
            retention=retention,
            mirror=Mirror(self._storage, retention, self._lease) if self._storage and self._lease else None,
            timeout_s=timeout_s,
        )

    def _claim_and_find(self, config: RunConfig, note: Callable[[str], None]) -> dict[str, Any]:
        """On rank 0: the id of the run, and the commit that it resumes from."""
        run_id, self._lease = claim(config, self._storage, say=note)
        storage = self._storage if self._lease and self._lease.held else None
        commit, skipped = find(resume=config.checkpoint.resume, root=self.root, storage=storage)
        if commit and commit.folder.parent == self.root:
            state = RunState.from_dict(commit.state(), where=commit.folder / STATE)
            if state.run_id not in (None, run_id):
                raise CheckpointError(
                    f"{commit.folder}: is a commit of another run than the one in {config.run_dir}. Move it away, or "
                    f"{NEW_RUN}."
                )
        return {"run_id": run_id} | as_answer(commit, skipped)

    @property
    def base(self) -> BaseRecord:
        found: BaseRecord = self._identity["base"]
        return found

    def is_due(self, step: int) -> bool:
        return self._interval > 0 and step % self._interval == 0

    @property
    def failed(self) -> bool:
        """Whether the last save that ended has failed. Known on rank 0 only."""
        return self.writer.failed

    def save(self, state: RunState, *, again: bool = False) -> None:
        """Save the engine and the run's part of the state. See `wait_until_copied` and `finish`.

        `again`: even if this step was saved last.
        """
        own = {
            "adam_step": adam_step(self._engine),
            "parameters": self._engine.trainable_shapes(),
            "world_size": self._world.size,
            "zero_stage": self._engine.stage,
            "run_id": self._run_id,
        }
        whole = state.model_copy(update=own | self._identity)
        tensors = owned_tensors(self._engine)
        losses = state.held_out_losses
        self.writer.save(tensors, step=state.step, state=whole.to_dict(), held_out_losses=losses, again=again)

    def wait_until_copied(self) -> float:
        """Wait until the engine may change what the last save reads; returns the seconds waited."""
        return self.writer.wait_until_copied()

    def finish(self) -> None:
        """Wait, on every rank, until the last save is a commit or has failed. A collective."""
        self.writer.wait()
        barrier(self._world)  # rank 0 seals; a rank that left before would end the job

    def load_best(self, losses: Mapping[int, float], *, current: int) -> tuple[int, list[str]]:
        """Load the commit with the lowest of the held-out `losses` by step, unless that is `current`, already loaded.

        Returns the step whose weights the engine now holds, and one line per damaged commit. A collective, after
        `finish`. Raises CheckpointError.
        """
        commit, skipped = agreed_best(
            self._world,
            losses=losses,
            current=current,
            root=self.root,
            storage=self._storage if self._lease and self._lease.held else None,
            timeout_s=self._timeout_s,
        )
        if commit is None:
            return current, skipped
        load(self._engine, commit)
        barrier(self._world)
        return commit.step, skipped

    def is_committed(self, step: int) -> bool:
        return self.writer.is_committed(step)

    def record_saves(self, recorder: Recorder) -> None:
        """Record the events of background saves since the last call."""
        for event in self.writer.new_events():
            recorder.event(event.name, step=event.step, **event.fields)
            if event.name == "saved":
                self.saved_s, self.saved_at = float(event.fields["seconds"]), time.monotonic()
            if event.note:
                recorder.console.note(event.note)

    def close(self) -> None:
        """Wait, for a bounded time, for saves and copies in flight."""
        self.writer.close()
