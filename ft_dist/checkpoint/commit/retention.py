"""Which commits to keep: the newest, milestones, the best by held-out loss. Never deletes the latest save."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ft_dist.config.schema import RunConfig


@dataclass(frozen=True)
class Retention:
    """Keep the `keep` newest, steps divisible by `every_steps` (milestones), and the `best` by held-out loss."""

    keep: int
    every_steps: int | None = None
    best: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> "Retention":
        """`optim.load_best` needs the best commit at the end."""
        checkpoint = config.checkpoint
        return cls(checkpoint.keep, checkpoint.keep_every_steps, max(checkpoint.keep_best, int(config.optim.load_best)))

    def is_milestone(self, step: int) -> bool:
        return self.every_steps is not None and step % self.every_steps == 0

    def surplus(self, steps: Iterable[int], *, newest: int, losses: Mapping[int, float]) -> list[int]:
        """The `steps` to delete now that `newest` is committed. `losses` are held-out losses by step."""
        steps = sorted(set(steps) | {newest})
        kept = {newest, *steps[-self.keep :], *by_loss(steps, losses)[: self.best], *filter(self.is_milestone, steps)}
        return [step for step in steps if step not in kept]


def by_loss(steps: Iterable[int], losses: Mapping[int, float]) -> list[int]:
    """The `steps` that have a finite held-out loss, lowest loss first; of equal losses the earlier step."""
    finite = [step for step in steps if math.isfinite(losses.get(step, math.inf))]
    return sorted(finite, key=lambda step: (losses[step], step))
