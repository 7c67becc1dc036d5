"""The evaluations of a run: when they are due, and what follows from the held-out losses: an early stop, the best step.

Both follow from losses that are the same on every rank and in every commit, so all ranks decide the same, and a resumed
run decides as an uninterrupted one.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from ft_dist.checkpoint.commit.retention import by_loss
from ft_dist.config.schema import EvaluateConfig
from ft_dist.engine.step import Engine
from ft_dist.errors import counted
from ft_dist.evaluate.comparison import summary_line
from ft_dist.evaluate.held_out import HeldOut
from ft_dist.observe.recorder import Recorder


class Evaluations:
    """`losses` are the held-out losses by step (0: before training), infinite if not finite."""

    def __init__(self, settings: EvaluateConfig, held_out: HeldOut | None, engine: Engine, tokenizer: Any) -> None:
        self._settings = settings
        self._held_out = held_out
        self._engine, self._tokenizer = engine, tokenizer
        self.losses: dict[int, float] = {}
        self._last: tuple[int, dict[str, Any]] | None = None

    def is_due(self, step: int, *, finished: bool) -> bool:
        """Whether `step` is to be evaluated before it is committed; False once it has been."""
        interval = self._settings.interval_steps
        due = bool(self._held_out) and interval > 0 and step > 0 and (step % interval == 0 or finished)
        return due and step not in self.losses

    def score(
        self, when: str, *, step: int, recorder: Recorder, stop_wanted: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Score the engine, which holds the weights of `step`, and record it; None without held-out data.

        Repeats the last scores if they are those of `step`. Raises EvaluationStopped.
        """
        if not self._held_out:
            return None
        say, started = recorder.console.say, time.perf_counter()
        if self._last and self._last[0] == step:
            scores = self._last[1]
        else:
            say(f"evaluating {when} training on {counted(len(self._held_out), 'held-out sample')}")
            scores = self._held_out.score(self._engine, self._tokenizer, say=say, stop_wanted=stop_wanted).to_dict()
        say(f"{when}: {summary_line(scores)}")
        recorder.scores(when, scores, step, time.perf_counter() - started, track=step not in self.losses)
        self._last = step, scores
        self.losses[step] = math.inf if scores["loss"] is None else scores["loss"]
        return scores

    @property
    def best_step(self) -> int | None:
        """The step with the lowest loss, the earliest of equals; None without one."""
        ranked = by_loss(self.losses, self.losses)
        return ranked[0] if ranked else None

    @property
    def stalled(self) -> int:
        """Evaluations in a row, up to the last, without a new lowest loss."""
        steps = sorted(self.losses)
        return len(steps) if self.best_step is None else len(steps) - 1 - steps.index(self.best_step)

    @property
    def out_of_patience(self) -> bool:
        return self._settings.patience is not None and self.stalled >= self._settings.patience

    def why_stopped(self) -> str:
        """For a run that is out of patience, as a phrase."""
        if self.best_step is None:
            return f"no held-out loss of {self.stalled} evaluations was finite (evaluate.patience)"
        return (
            f"{counted(self.stalled, 'evaluation')} in a row did not lower the held-out loss of "
            f"{self.losses[self.best_step]:.4f} from step {self.best_step} (evaluate.patience)"
        )

    def shortfall(self, step: int) -> list[str]:
        """A line if a step other than `step`, which becomes the result, has the lowest loss."""
        best = self.best_step
        if best in (None, step):
            return []
        where = f"step {best}" if best else "the model before training"
        return [f"{where} had a lower held-out loss, {self.losses[best]:.4f}, but has no usable commit"]
