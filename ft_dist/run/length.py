"""How many steps a run has, and the note for a run whose data end early or that has nothing left to train."""

from typing import NamedTuple

from ft_dist.config.schema import OptimConfig
from ft_dist.data.stream.batch import BatchStream
from ft_dist.errors import counted


class RunLength(NamedTuple):
    """Steps from the first to the last. For the learning rate and the ETA; the run itself ends with its data, or at
    optim.max_steps."""

    steps: int
    exact: bool

    def __str__(self) -> str:
        return f"{'' if self.exact else 'about '}{counted(self.steps, 'step')}"


def run_length(optim: OptimConfig, stream: BatchStream) -> RunLength:
    epochs, limit = optim.most_epochs, optim.max_steps
    if epochs is None:
        assert limit is not None, "without epochs, optim.max_steps ends the run"
        return RunLength(limit, True)
    steps = stream.total_steps(epochs, at_most=limit)
    return RunLength(steps, steps == limit or stream.counts_exactly(epochs))


def is_over(optim: OptimConfig, *, step: int, epoch: int) -> bool:
    """True once optim.max_steps or the end of optim.epochs is reached."""
    epochs, limit = optim.most_epochs, optim.max_steps
    return (epochs is not None and epoch >= epochs) or (limit is not None and step >= limit)


def length_notes(optim: OptimConfig, length: RunLength, *, step: int, finished: bool) -> list[str]:
    """Up to one line for the start of a run at `step`."""
    limit = optim.max_steps
    if finished:
        key, value = ("max_steps", limit) if limit is not None and step >= limit else ("epochs", optim.most_epochs)
        return [
            f"the run has already finished, at step {step}: optim.{key}={value}. To train longer, raise optim.{key} "
            "and run again"
        ]
    if length.steps < optim.warmup_steps:
        return [
            f"optim.warmup_steps={optim.warmup_steps} is more than the run has ({length}): it ends before the rate "
            "reaches optim.lr. Lower it, or train for more epochs"
        ]
    if optim.epochs is not None and limit is not None and length.steps < limit:
        return [
            f"optim.epochs={optim.epochs} ends the run after {length}, before optim.max_steps={limit}. Raise "
            "optim.epochs, or set optim.epochs=null to train for all of these steps"
        ]
    return []
