"""Which commits to keep: the newest, milestones, the best by held-out loss. Never deletes the latest save."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ft_dist.config.schema import CheckpointConfig


@dataclass(frozen=True)
class Retention:
    """Keep the `keep` newest, steps divisible by `every_steps` (milestones), and the `best` by held-out loss."""

    keep: int
    every_steps: int | None = None
    best: int = 0

    @classmethod
    def of(cls, config: CheckpointConfig) -> "Retention":
        return cls(config.keep, config.keep_every_steps, config.keep_best)

    def is_milestone(self, step: int) -> bool:
        return self.every_steps is not None and step % self.every_steps == 0

    def surplus(self, steps: Iterable[int], *, newest: int, losses: Mapping[int, float]) -> list[int]:
        """The `steps` to delete now that `newest` is committed. `losses` are held-out losses by step."""
        steps = sorted(set(steps) | {newest})
        scored = sorted((step for step in steps if step in losses), key=lambda step: (losses[step], step))
        kept = {newest, *steps[-self.keep :], *scored[: self.best], *filter(self.is_milestone, steps)}
        return [step for step in steps if step not in kept]
