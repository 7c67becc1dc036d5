"""One rank's run: its parts (data, engine, recorder) and where it stands.

`prepare_run` builds the parts in the order in which mistakes are cheapest: checks and tokenising before the process
group exists, weights after.
"""

import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ft_dist.check import check
from ft_dist.checkpoint.find import agreed_commit
from ft_dist.checkpoint.format import Commit
from ft_dist.checkpoint.identity import check_identity, identity
from ft_dist.checkpoint.load import load
from ft_dist.checkpoint.mirror import MIRROR_WAIT_S, Mirror
from ft_dist.checkpoint.retention import Retention
from ft_dist.checkpoint.writer import CheckpointWriter
from ft_dist.config import RunConfig
from ft_dist.data.batch import Prefetched, Prefetcher
from ft_dist.data.prepare import prepare
from ft_dist.data.report import progress_printer, report_lines
from ft_dist.data.stream import DataStream
from ft_dist.distributed import World, barrier, join_world, leave_world
from ft_dist.engine.build import build_engine
from ft_dist.engine.final import write_final
from ft_dist.engine.fragments import adam_step, owned_tensors
from ft_dist.engine.step import Engine, StepResult
from ft_dist.errors import TrainingError
from ft_dist.evaluate.comparison import comparison
from ft_dist.evaluate.held_out import HeldOut
from ft_dist.model.builtin import resolve_model
from ft_dist.model.tokenizer import load_tokenizer
from ft_dist.observe.console import Console
from ft_dist.observe.recorder import Recorder, log_rank_output
from ft_dist.observe.trackers import keep_wandb_run_id, wandb_run_id
from ft_dist.resources import flops_per_token, peak_flops, peak_memory_bytes, versions
from ft_dist.storage import Storage, open_storage


class Clock:
    """Splits wall time into laps without gaps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed


def prepare_run(config: RunConfig) -> "Run":
    """Everything up to the first step. Raises UserError."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    facts = check(config, world_size=size)
    folder = resolve_model(config.model.path)
    tokenizer, notes = load_tokenizer(
        folder,
        chat_template=config.model.chat_template,
        new_tokens=config.model.new_tokens,
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision,
    )
    say = Console(enabled=rank == 0).say
    train_set = prepare(
        config.data.train, tokenizer, data=config.data, model_path=config.model.path, progress=progress_printer(say)
    )
    held_out = HeldOut.prepare(config, tokenizer) if config.data.eval else None
    # nothing is written below output_dir before all that one process can find wrong has been told
    log_file = log_rank_output(config, rank=rank)
    world = join_world(timeout_s=config.engine.timeout_s)
    engine = build_engine(config, world, folder=folder, tokenizer=tokenizer)
    stream = DataStream(
        train_set.weighted,
        seed=config.seed,
        global_rows=config.batch.global_rows,
        max_length=config.data.max_length,
        packing=config.data.packing,
    )
    run = Run(config, world, engine, stream, tokenizer=tokenizer, held_out=held_out, folder=folder)
    run.log_file = log_file
    run.start(facts=[*facts, *notes, *report_lines(train_set, "train")])
    return run


class Run:
    """The parts of a run and its position: `step` optimizer steps are done."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        engine: Engine,
        stream: DataStream,
        *,
        tokenizer: Any,
        held_out: HeldOut | None,
        folder: str,
    ) -> None:
        self.config = config
        self.world = world
        self.engine = engine
        self.stream = stream
        self.tokenizer = tokenizer
        self.held_out = held_out
        self.log_file: Any = None
        self.total_steps = stream.total_steps(config.optim.epochs)
        if config.optim.max_steps:
            self.total_steps = min(self.total_steps, config.optim.max_steps)
        self.step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.first_step = 0
        self.clock = Clock()
        self._state_after: dict[str, int] = stream.state_dict()
        self._checkpoint_stall_s = 0.0
        self._tokens_done = 0
        self._last_loss: float | None = None
        self._held_out_losses: dict[int, float] = {}
        self._identity = identity(config, folder=folder)
        self._changed: list[str] = []
        storage = self._second_place() if config.checkpoint.path else None
        commit, self._passed_over = agreed_commit(
            world,
            resume=config.checkpoint.resume,
            root=self.checkpoints,
            storage=storage,
            timeout_s=config.engine.timeout_s,
        )
        if commit:
            self._resume(commit)
        retention = Retention.of(config.checkpoint)
        self.writer = CheckpointWriter(
            self.checkpoints,
            world,
            retention=retention,
            mirror=Mirror(storage, retention) if storage and world.is_main else None,
            timeout_s=config.engine.timeout_s,
        )
        self.recorder = Recorder(config, world, resumed_step=self.step)

    @property
    def checkpoints(self) -> Path:
        return self.config.run_dir / "checkpoints"

    def start(self, *, facts: list[str]) -> None:
        console = self.recorder.console
        for fact in facts:
            console.say(fact)
        console.say(self.engine.kernels)
        for line in self._passed_over:
            console.note(f"checkpoint passed over: {line}")
        trainable = sum(getattr(p, "ds_numel", p.numel()) for _, p in self.engine.trainable())
        console.say(
            f"training {trainable / 1e6:,.2f} M parameters ({self.config.method.kind}, ZeRO {self.engine.stage}, "
            f"{self.config.model.dtype}) for {self.total_steps} steps on {self.world.size} x {self.world.device.type}"
        )
        name = "resume" if self.step else "start"
        self.recorder.event(name, step=self.step, world_size=self.world.size, versions=versions())
        if self.step:
            console.say(f"resumed from step {self.step}")
        if self._changed:
            self.recorder.event("config_changed", step=self.step, changes=self._changed)
            for line in self._changed:
                console.note(f"changed since the checkpoint: {line}")

    def batches(self) -> Iterator[Prefetched]:
        """This rank's share of every step that is left."""
        if self.step >= self.total_steps:
            return
        self.clock.lap()
        with Prefetcher(
            self.stream,
            rank=self.world.rank,
            world=self.world.size,
            micro_rows=self.config.batch.micro_rows,
            pad_id=self.tokenizer.pad_token_id or 0,
            pin_memory=self.world.device.type == "cuda",
        ) as prefetcher:
            for batch in prefetcher:
                yield batch
                if self.step >= self.total_steps:
                    return

    def seed_step(self) -> None:
        """Random numbers (dropout) are a function of seed, step and rank: a resumed run needs no saved generators."""
        seed = hash((self.config.seed, self.step, self.world.rank)) & (2**63 - 1)
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
        record = {
            "step": self.step,
            "loss": result.loss if math.isfinite(result.loss) else None,
            "lr": learning_rate,
            "grad_norm": None if result.skipped else result.grad_norm,
            "labelled_tokens": batch.batch.labelled_tokens,
            "real_tokens": batch.batch.real_tokens,
            "padded_tokens": int(result.sums[1]),
            "tokens_per_s": round(batch.batch.real_tokens / (step_s + waited_s), 3),
            "step_s": round(step_s, 6),
            "data_wait_s": round(waited_s, 6),
            "checkpoint_stall_s": round(self._checkpoint_stall_s, 6),
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
            "epoch": round(batch.batch.progress, 6),
            "samples_seen": batch.state_after["samples_seen"],
        }
        self._checkpoint_stall_s = 0.0
        self.recorder.step(record, sample_ids=batch.batch.rows)
        self._tell(record, step_s + waited_s)
        self._tell_saves()
        if self.skipped_in_a_row >= self.config.optim.max_skipped_steps:
            raise TrainingError(
                f"loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step {self.step}. "
                f"Lower optim.lr ({self.config.optim.lr}), look at the samples of these steps (data.log_samples=true), "
                "and run again: it goes on from the last commit."
            )

    def _count_skipped(self, result: StepResult) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if result.skipped:
            self.skipped_steps += 1
            self.recorder.event("skipped", step=self.step, reason="loss or gradient not finite")

    def _tell(self, record: dict[str, Any], seconds: float) -> None:
        peak = peak_flops(self.world.device)
        mfu = None
        if peak:
            per_token = flops_per_token(
                total_parameters=self.engine.total_parameters, trainable_share=self.engine.trainable_share
            )
            mfu = record["real_tokens"] * per_token / seconds / (peak * self.world.size)
        eta_s = (self.total_steps - self.step) * seconds
        last = self.step in (self.first_step + 1, self.total_steps)
        self.recorder.console.step(record, total_steps=self.total_steps, eta_s=eta_s, mfu=mfu, last=last)

    def commit_is_due(self) -> bool:
        interval = self.config.checkpoint.interval_steps
        return self.step == self.total_steps or (interval > 0 and self.step % interval == 0)

    def evaluation_is_due(self) -> bool:
        interval = self.config.evaluate.interval_steps
        return bool(self.held_out) and interval > 0 and self.step % interval == 0 and self.step < self.total_steps

    def commit(self) -> None:
        """Save the state after the current step: returns when it is copied; see `finish_commits`."""
        state = {
            "step": self.step,
            "adam_step": adam_step(self.engine),
            "parameters": self.engine.trainable_shapes(),
            "data": self._state_after,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "tokens": self._tokens_done,
            "loss": self._last_loss,
            "held_out_losses": self._held_out_losses,
            "wandb_run_id": wandb_run_id(self.config),
            "world_size": self.world.size,
            "zero_stage": self.engine.stage,
            "versions": versions(),
            **self._identity,
        }
        tensors = owned_tensors(self.engine)
        self.writer.save(tensors, step=self.step, state=state, held_out_losses=self._held_out_losses)
        self._checkpoint_stall_s += self.clock.lap()

    def finish_commits(self) -> None:
        """Return when the last commit is on disk, or its failure told."""
        self.writer.wait()
        self._tell_saves()

    def _tell_saves(self) -> None:
        for report in self.writer.reports():
            self.recorder.event(report.event, step=report.step, **report.fields)
            if report.note:
                self.recorder.console.note(report.note)

    def note_preempted(self, reason: str) -> None:
        self.recorder.event("preempted", step=self.step, reason=reason or "another rank")
        safe = "its state is committed" if self.writer.is_committed(self.step) else "its state could not be saved"
        self.recorder.console.say(f"stopped by {reason or 'another rank'} after step {self.step}; {safe}")

    def evaluate(self, when: str) -> dict[str, Any] | None:
        """Scores on data.eval, or None without held-out data. `before` is measured once in the life of a run."""
        if not self.held_out:
            return None
        if when == "before" and self.step > 0:
            return self.recorder.earlier_scores(when)
        self.clock.lap()
        self.recorder.console.say(f"evaluating {when} training on {len(self.held_out)} held-out samples")
        scores = self.held_out.score(self.engine, self.tokenizer, say=self.recorder.console.say).to_dict()
        self.recorder.console.say(f"{when}: " + summary_line(scores))
        if scores["loss"] is not None:
            self._held_out_losses[self.step] = scores["loss"]
        self.recorder.scores(when, scores, self.step, self.clock.lap())
        return scores

    def write_final(self) -> None:
        """final/: an adapter or a model that plain peft and transformers load."""
        write_final(self.engine, self.tokenizer, self.config.run_dir / "final")

    def summarise(self, *, before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
        self.recorder.summary(
            {
                "steps": self.step,
                "loss": self._last_loss,
                "tokens": self._tokens_done,
                "samples_seen": self._state_after["samples_seen"],
                "skipped_steps": self.skipped_steps,
                "world_size": self.world.size,
                "peak_memory_bytes": peak_memory_bytes(self.world.device),
                "before": before,
                "after": after,
                "versions": versions(),
            }
        )
        self.recorder.event("end", step=self.step)
        for line in comparison(before, after) if after else []:
            self.recorder.console.say(line)
        self.recorder.console.say(f"finished: {self.config.run_dir / 'final'}")
        self.recorder.console.say(f"talk to it:  ft-dist chat {self.config.run_dir}")

    def close(self) -> None:
        self.writer.close()
        self._tell_saves()
        self.recorder.close()
        leave_world()

    def _second_place(self) -> Storage:
        say = Console(enabled=self.world.is_main).note
        return open_storage(
            str(self.config.checkpoint.path), wait_s=MIRROR_WAIT_S, limit="the time for checkpoints", tell=say
        )

    def _resume(self, commit: Commit) -> None:
        state = commit.state()
        if "config" in state:
            self._changed = check_identity(state, self._identity, where=commit.folder)
        load(self.engine, commit)
        self.step = self.first_step = state["step"]
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        self._tokens_done, self._last_loss = state["tokens"], state["loss"]
        self._held_out_losses = {int(step): loss for step, loss in state.get("held_out_losses", {}).items()}
        if state["data"] is not None:
            self._state_after = state["data"]
            self.stream.load_state_dict(state["data"])
        if self.world.is_main and state.get("wandb_run_id") and not wandb_run_id(self.config):
            keep_wandb_run_id(self.config, state["wandb_run_id"])
        barrier(self.world)


def summary_line(scores: dict[str, Any]) -> str:
    parts = [f"{key} {scores[key]:.4f}" for key in ("loss", "perplexity") if scores[key] is not None]
    parts = parts or ["loss not finite"]
    if scores.get("accuracy") is not None:
        parts.append(f"accuracy {scores['accuracy']:.1%}")
    return ", ".join(parts)
