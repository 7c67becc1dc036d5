"""One rank's run: its position, its commits, its evaluations. `ft_dist.run.start` builds the parts."""

import hashlib
import random
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from ft_dist.checkpoint.keeper import CheckpointKeeper
from ft_dist.checkpoint.state import RunState
from ft_dist.config import RunConfig
from ft_dist.data.stream.batch import BatchStream, Prefetched, Prefetcher
from ft_dist.data.stream.stream import DataStream
from ft_dist.distributed import World, announce_stop, announced_fault, leave_world, stop_announced
from ft_dist.engine.replicas import verify_replicas
from ft_dist.engine.step import Engine, StepResult
from ft_dist.errors import DataError, Preempted, TrainingError, UserError
from ft_dist.evaluate.comparison import comparison
from ft_dist.evaluate.held_out import EvaluationStopped, HeldOut
from ft_dist.observe.console import Console
from ft_dist.observe.recorder import Recorder
from ft_dist.observe.trackers import keep_wandb_run_id, wandb_run_id
from ft_dist.preemption.stop import StopRequest
from ft_dist.preemption.watchdog import Watchdog
from ft_dist.resources import peak_memory_bytes, versions
from ft_dist.run.evaluations import Evaluations
from ft_dist.run.last_commit import repeat_failed_commit
from ft_dist.run.length import is_over, run_length
from ft_dist.run.planned import Planned
from ft_dist.run.proof.final import check_line, write_and_prove
from ft_dist.run.start_report import report_start
from ft_dist.run.step_record import Clock, print_step, step_record

WAIT_FOR_DATA_S = 5.0
"""How long a rank that was asked to stop waits for the data of its last step"""
TRACKERS_WAIT_S = 60.0
STOPPED_WAIT_S = 5.0
"""How long the end of a run waits for trackers; of a run that was asked to stop"""


class Run:
    """The parts of a run and its position after `step` optimizer steps."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        engine: Engine,
        stream: BatchStream,
        stop: StopRequest,
        *,
        tokenizer: Any,
        held_out: HeldOut | None,
        folder: str,
    ) -> None:
        self.config = config
        self.world = world
        self.engine = engine
        self.stream = stream
        self.stop = stop
        self.tokenizer = tokenizer
        self.held_out = held_out
        self.step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.first_step = 0
        self.clock = Clock()
        self._state_after: dict[str, Any] = stream.state_dict()
        self.data_changes: list[str] = []
        self._checkpoint_stall_s = 0.0
        self._loaded_step: int | None = None
        self._tokens_done = 0
        self._last_loss: float | None = None
        self.evaluations = Evaluations(config.evaluate, held_out, engine, tokenizer)
        self._base_folder = folder
        self._final_check: dict[str, Any] = {}
        self.checkpoints = CheckpointKeeper(config, world, engine, folder=folder)
        if self.checkpoints.resumed:
            self._resume(self.checkpoints.resumed)
        self.length = run_length(config.optim, stream)
        self.total_steps = self.length.steps
        self._committed_step = self.step
        self._store_asked_at = 0.0
        self.recorder = Recorder(config, world, resumed_step=self.step)
        self.watchdog = Watchdog(timeout_s=config.hang_timeout_s, run_dir=config.run_dir, rank=world.rank, stop=stop)
        self.planned = Planned(config, world, flash=engine.flash)
        self.watchdog.step = self.step
        engine.on_progress = self.watchdog.beat
        engine.before_update = self.checkpoints.wait_until_copied
        stop.notify_others = announce_stop

    @property
    def finished(self) -> bool:
        """True once optim.max_steps, the end of optim.epochs or that of evaluate.patience is reached."""
        over = is_over(self.config.optim, step=self.step, epoch=self._state_after["epoch"])
        return over or self.evaluations.out_of_patience

    @property
    def weights_step(self) -> int:
        """The step whose weights the engine holds."""
        return self.step if self._loaded_step is None else self._loaded_step

    def start(self, *, facts: list[str], data_report: dict[str, Any]) -> None:
        """Report what starts or resumes, and start the watchdog."""
        report_start(self, facts=facts, data_report=data_report)
        self.watchdog.start()

    def batches(self) -> Iterator[Prefetched]:
        """This rank's share of each remaining step."""
        if self.finished:
            return
        self.clock.lap()
        on_gpu = self.world.device.type == "cuda"
        with Prefetcher(
            self.stream,
            rank=self.world.data_rank,
            world=self.world.data_size,
            micro_rows=self.config.batch.micro_rows,
            pad_id=self.tokenizer.pad_token_id or 0,
            gpu_length=self.config.data.max_length if on_gpu else None,
            give_up=self._is_late,
        ) as prefetcher:
            for batch in prefetcher:
                yield batch
                if self.finished:
                    return

    def _is_late(self) -> bool:
        """True if the run must stop without the data it waits for."""
        return self._stop_requested() and self.stop.wanted_for_s > WAIT_FOR_DATA_S

    def _stop_requested(self) -> bool:
        """True if any rank was asked to stop. For work that runs long without a reduction: polls the store once a
        second."""
        now = time.monotonic()
        if not self.stop.wanted and now - self._store_asked_at >= 1.0:
            self._store_asked_at = now
            if stop_announced():
                self.stop.ask("another rank")
        return self.stop.wanted

    def seed_step(self) -> None:
        """Random numbers (dropout) are a function of seed, step and rank, so a commit stores no generator states."""
        place = f"{self.config.seed} {self.step} {self.world.rank}".encode()
        seed = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") >> 1
        torch.manual_seed(seed)
        random.seed(seed)

    def finish_step(
        self, batch: Prefetched, result: StepResult, *, learning_rate: float, waited_s: float, step_s: float
    ) -> None:
        """Count and record a step. Raises TrainingError after too many non-finite ones in a row."""
        self.step += 1
        self._state_after = batch.state_after
        self._tokens_done += batch.batch.real_tokens
        self._last_loss = result.loss
        self._count_skipped(result)
        record = step_record(
            batch,
            result,
            step=self.step,
            learning_rate=learning_rate,
            waited_s=waited_s,
            step_s=step_s,
            checkpoint_stall_s=self._checkpoint_stall_s + result.held_up_s,
            peak_bytes=peak_memory_bytes(self.world.device),
        )
        self._checkpoint_stall_s = 0.0
        self.planned.step_took(step_s)
        self.recorder.step(record, sample_ids=batch.batch.rows)
        print_step(
            self.recorder.console,
            record,
            self.engine,
            seconds=step_s + waited_s,
            total_steps=self.step if self.finished else max(self.total_steps, self.step + 1),
            last=self.finished or self.step == self.first_step + 1,
        )
        self._record_saves()
        self.watchdog.step = self.step
        if self.stop.time_limit:
            self.stop.time_limit.step_s = step_s + waited_s
        if self.skipped_in_a_row >= self.config.optim.max_skipped_steps:
            raise TrainingError(
                f"loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step {self.step}. "
                f"Lower optim.lr ({self.config.optim.lr}), inspect the samples of these steps (data.log_samples=true), "
                "and run again: it resumes from the last commit."
            )

    def _count_skipped(self, result: StepResult) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if result.skipped:
            self.skipped_steps += 1
            self.recorder.event("skipped", step=self.step, reason="loss or gradient not finite")

    def commit_is_due(self) -> bool:
        """An evaluation comes first, so that a commit holds the loss of its own step."""
        evaluated = self.config.optim.load_best and self.step in self.evaluations.losses
        return self.finished or evaluated or self.checkpoints.is_due(self.step)

    def evaluation_is_due(self) -> bool:
        return self.evaluations.is_due(self.step, finished=self.finished)

    def commit(self, *, again: bool = False) -> None:
        """Save the state after the current step, in the background (see `finish_commits`). Raises TrainingError."""
        if self.config.engine.verify_steps:
            verify_replicas(self.engine.objective, self.world, step=self.step)
        state = RunState(
            step=self.step,
            data=self._state_after,
            skipped_steps=self.skipped_steps,
            skipped_in_a_row=self.skipped_in_a_row,
            tokens=self._tokens_done,
            loss=self._last_loss,
            wandb_run_id=wandb_run_id(self.config),
            versions=versions(),
            held_out_losses=dict(self.evaluations.losses),
        )
        with self.watchdog.during("a commit", timeout_s=self.config.engine.timeout_s):
            self.checkpoints.save(state, again=again)
        self._committed_step = self.step
        self._checkpoint_stall_s += self.clock.lap()

    def finish_commits(self, *, insist: bool = False) -> None:
        """Return when the last commit is on disk or its failure is reported. All ranks call it at the same step.

        `insist`: the run is about to end, so repeat a commit that failed for a while.
        """
        with self.watchdog.during("a commit", timeout_s=self.config.engine.timeout_s):
            self.checkpoints.finish()
        self._record_saves()
        if insist:
            repeat_failed_commit(
                self._commit_again,
                failed=lambda: self.checkpoints.failed,
                unsaved_s=time.monotonic() - self.checkpoints.saved_at,
                world=self.world,
                stop=self.stop,
                note=self.recorder.console.note,
            )

    def _commit_again(self) -> None:
        self.commit(again=True)
        self.finish_commits()

    def _record_saves(self) -> None:
        self.checkpoints.record_saves(self.recorder)
        if self.stop.time_limit:
            self.stop.time_limit.save_s = self.checkpoints.saved_s

    def leave_preempted(self) -> NoReturn:
        """Commit this step unless it is already committed, and end the run. All ranks call it after the same step."""
        if self.step > self._committed_step:
            # drop the time of an interrupted evaluation or step
            self.clock.lap()
            self.commit()
        self.finish_commits(insist=True)
        reason = self.stop.reason or "another rank"
        self.recorder.event("preempted", step=self.step, reason=reason)
        safe = "its state is committed" if self.checkpoints.is_committed(self.step) else "its state could not be saved"
        self.recorder.console.say(f"stopped by {reason} after step {self.step}; {safe}")
        raise Preempted

    def leave_abandoned(self, error: UserError | None) -> NoReturn:
        """End the run after a step without an update: because a rank's data cannot be read, or to stop in time.

        All ranks call it after the same step. Data that cannot be read end the run on all ranks, without a commit.
        """
        announced = announced_fault(self.world)
        if error or announced:
            raise error or DataError(str(announced))
        self.leave_preempted()

    def evaluate(self, when: str) -> dict[str, Any] | None:
        """Scores on data.eval of the weights that the engine holds, or None without held-out data.

        A resumed run reuses the scores of `before`. Raises Preempted, with the state committed, if a rank is asked to
        stop during it.
        """
        if when == "before" and self.step > 0:
            return self.recorder.earlier_scores(when) if self.held_out else None
        try:
            scores = self.evaluations.score(
                when, step=self.weights_step, recorder=self.recorder, stop_wanted=self._stop_requested
            )
        except EvaluationStopped:
            self.leave_preempted()
        self.clock.lap()
        return scores

    def explain_early_stop(self) -> None:
        if self.evaluations.out_of_patience:
            self.recorder.console.say(f"stopped early after step {self.step}: {self.evaluations.why_stopped()}")

    def load_best(self) -> None:
        """With optim.load_best, load the weights of the step with the lowest held-out loss. Nothing is saved after."""
        if not self.config.optim.load_best:
            return
        with self.watchdog.during("loading the best commit", timeout_s=self.config.engine.timeout_s):
            losses = self.evaluations.losses
            self._loaded_step, skipped = self.checkpoints.load_best(losses, current=self.step)
        for line in [*skipped, *self.evaluations.shortfall(self.weights_step)]:
            self.recorder.console.note(line)
        self.recorder.console.say(f"final/ gets the weights of step {self.weights_step}")

    def write_final(self) -> None:
        """Write and check final/: an adapter or a model that plain peft and transformers load.

        Raises StorageError or TrainingError, with the run's state committed.
        """
        # a live source keeps no samples
        store = self.stream.store if isinstance(self.stream, DataStream) else None
        with self.watchdog.during("the final write", timeout_s=self.config.engine.timeout_s):
            self._final_check, notes = write_and_prove(
                self.engine,
                self.tokenizer,
                self.config,
                base=self._base_folder,
                step=self.step,
                samples=self.held_out.store if self.held_out else store,
            )
        if self._final_check:
            self.recorder.console.say(check_line(self._final_check))
        for note in notes:
            self.recorder.console.note(note)

    def summarise(self, *, before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
        self.recorder.summary(
            {
                "steps": self.step,
                "final_step": self.weights_step,
                "best_step": self.evaluations.best_step,
                "stopped_early": self.evaluations.out_of_patience,
                "loss": self._last_loss,
                "tokens": self._tokens_done,
                "samples_seen": self._state_after["samples_seen"],
                "skipped_steps": self.skipped_steps,
                "world_size": self.world.size,
                "peak_memory_bytes": peak_memory_bytes(self.world.device),
                **self.planned.comparison(),
                "before": before,
                "after": after,
                "base": self.checkpoints.base.model_dump(),
                "final_check": self._final_check,
                "versions": versions(),
            }
        )
        self.recorder.event("end", step=self.step)
        for line in comparison(before, after) if after else []:
            self.recorder.console.say(line)
        self.recorder.console.say(f"finished: {self.config.run_dir / 'final'}")
        self.recorder.console.say(f"talk to it:  ft-dist chat {self.config.run_dir}")

    def close(self) -> None:
        self.watchdog.close()
        self.checkpoints.close()
        self._record_saves()
        self.recorder.close(wait_s=STOPPED_WAIT_S if self.stop.wanted else TRACKERS_WAIT_S)
        leave_world()

    def _resume(self, state: RunState) -> None:
        self.step = self.first_step = state.step
        self.skipped_steps, self.skipped_in_a_row = state.skipped_steps, state.skipped_in_a_row
        self._tokens_done, self._last_loss = state.tokens, state.loss
        self.evaluations.losses = dict(state.held_out_losses)
        if state.data is not None:
            self._state_after = state.data
            self.data_changes = self.stream.load_state_dict(state.data)
        if self.world.is_main and state.wandb_run_id and not wandb_run_id(self.config):
            keep_wandb_run_id(self.config, state.wandb_run_id, note=Console(enabled=True).note)
