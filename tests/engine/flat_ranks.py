"""One rank that updates small bf16 models: `python -m tests.engine.flat_ranks OUT` writes rank 0's results.

Every step takes the same two micro-batches, both on one rank or one on each of two.
"""

import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ft_dist.config import load_config
from ft_dist.distributed import World, join_world, leave_world
from ft_dist.engine import flat_update
from ft_dist.engine.build import prepare_deepspeed
from ft_dist.engine.fragments import adam_step, fragments, hold_contents
from ft_dist.engine.step import Engine, StepResult, StepSums
from ft_dist.model.quiet import quiet_process, quietly
from ft_dist.network.open import open_store
from tests.checkpoint.odd_ranks import VOCABULARY, Batch, Objective, Odd

ROWS, TOKENS, RATE = 3, 5, 0.05
MAX_NORM, DECAY = 0.5, 0.1
NO_KERNELS = {"view", "detach", "slice", "select", "alias", "split", "unsqueeze", "narrow", "reshape", "t"}
NO_KERNELS |= {"empty", "new_empty", "_record_function_enter_new", "_record_function_exit"}


class Spoilt(Objective):
    """`factor` makes this rank's loss non-finite."""

    factor = 1.0

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids, labels, position_ids) * self.factor


class Many(torch.nn.Module):
    """A model of 203 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 4)
        self.layers = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(100)])
        self.head = torch.nn.Linear(4, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(input_ids)))


class Counted(TorchDispatchMode):
    """Operations that would be kernels on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in NO_KERNELS:
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


def make_engine(world: World, *settings: str, model: type[torch.nn.Module] = Odd) -> Engine:
    base = ["model.dtype=bf16", "method.kind=full", "engine.zero_stage=1", f"optim.max_grad_norm={MAX_NORM}"]
    base += [f"optim.weight_decay={DECAY}"]  # matrices only: there are two groups
    torch.manual_seed(0)
    with quietly():
        objective: Any = Spoilt(model())
        engine = Engine(objective, load_config("smoke", [*base, *settings]), world)
    hold_contents(engine)
    return engine


def micro_batches(step: int) -> list[Batch]:
    tokens = torch.randint(VOCABULARY, (2, ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(step))
    positions = torch.arange(TOKENS).expand(ROWS, -1)
    return [Batch(each[:, :-1], each[:, 1:].clone(), positions) for each in tokens]


def take(engine: Engine, step: int, *, dummies: int = 0, **options: Any) -> StepResult:
    mine: Any = micro_batches(step)[engine.world.rank :: engine.world.size]
    for _ in range(dummies):
        mine.append(micro_batches(step)[0])
        mine[-1].labels.fill_(-100)
    return engine.train_step(mine, weight=2 * ROWS * TOKENS, learning_rate=RATE, **options)


def state(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's master weights and moments, and the weights it computes with: `KIND/NAME@START`."""
    kept: dict[str, torch.Tensor] = {}
    if engine.stage < 3:
        kept = {f"bf16/{name}@0": p.detach().clone() for name, p in engine.trainable()}
    for fragment in fragments(engine):
        for kind, tensor in fragment.tensors.items():
            kept[f"{kind}/{fragment.segment.name}@{fragment.segment.start}"] = tensor.detach().clone()
    return kept


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def two_steps(world: World, *settings: str, dummies: int = 0) -> tuple[dict[str, torch.Tensor], list[Any]]:
    engine = make_engine(world, *settings)
    results = [take(engine, step, dummies=dummies) for step in range(2)]
    return state(engine), [(each.loss, each.grad_norm) for each in results]


def spoilt_step(world: World, *settings: str) -> dict[str, Any]:
    """A step that is non-finite only on rank 0, between two finite ones."""
    engine = make_engine(world, *settings)
    take(engine, 0)
    before = state(engine)
    engine.objective.factor = math.nan if world.rank == 0 else 1.0
    result = take(engine, 7)
    engine.objective.factor = 1.0
    unchanged = same(before, state(engine)) and adam_step(engine) == 1
    take(engine, 1)
    undisturbed, _ = two_steps(world, *settings)
    return {
        "skipped": result.skipped and math.isnan(result.grad_norm) and math.isnan(result.loss),
        "unchanged": unchanged,
        "forgotten": same(state(engine), undisturbed) and adam_step(engine) == 2,
    }


def order_of_events(world: World) -> dict[str, Any]:
    engine = make_engine(world)
    before = state(engine)
    seen: list[bool] = []

    def before_update() -> float:
        seen.append(same(before, state(engine)))
        return 0.5

    engine.before_update = before_update
    abandoned = take(engine, 0, abandon=world.rank == world.size - 1, to_sum=lambda: StepSums(stop_wanted=2.0))
    untouched = not seen and same(before, state(engine))
    engine = make_engine(world)
    engine.before_update = before_update
    made = take(engine, 0, to_sum=lambda: StepSums(2.0, float(len(seen))))
    return {
        "abandoned": abandoned.abandoned and abandoned.sums.stop_wanted == 2.0 * world.size and untouched,
        "asked_before": seen == [True] and not same(before, state(engine)) and made.held_up_s == 0.5,
        "sums": list(made.sums),
    }


def counts(world: World, stage: int) -> dict[str, int]:
    """Operations of a second update of a single group, and those that gathering gradients adds to a backward pass."""
    engine = make_engine(world, "optim.weight_decay=0", f"engine.zero_stage={stage}", model=Many)
    take(engine, 0)
    counted = {}

    def watch(holder: Any, name: str) -> None:
        call = getattr(holder, name)

        def watched(*arguments: Any) -> Any:
            with Counted() as mode:
                found = call(*arguments)
            counted[name] = mode.operations
            return found

        setattr(holder, name, watched)

    watch(engine, "_update")
    if engine.flat:
        watch(engine.flat, "add_gradients")
    take(engine, 1)
    return {name: sum(operations.values()) for name, operations in counted.items()}


def main() -> None:
    out = Path(sys.argv[1])
    quiet_process()
    world = join_world(open_store(timeout_s=120), timeout_s=120)
    prepare_deepspeed()
    found: dict[Any, Any] = {"two_steps": two_steps(world), "dummies": two_steps(world, dummies=1)}
    flat_update.PIECE_ELEMENTS = 50
    found["pieces"] = two_steps(world)
    flat_update.WHOLE_GRADIENT_ELEMENTS = 0
    found["one_by_one"] = two_steps(world)
    flat_update.PIECE_ELEMENTS, flat_update.WHOLE_GRADIENT_ELEMENTS = 1 << 26, 1 << 28
    found["unclipped"] = two_steps(world, "optim.max_grad_norm=0")
    found["order"] = order_of_events(world)
    for kind in ("adamw", "adamw_8bit", "muon"):
        found["spoilt", kind] = spoilt_step(world, f"optim.kind={kind}")
    for stage in (1, 2, 3):
        found["counts", stage] = counts(world, stage)
    found["spoilt", "stage 2"] = spoilt_step(world, "engine.zero_stage=2")
    found["spoilt", "stage 3"] = spoilt_step(world, "engine.zero_stage=3")
    if world.is_main:
        torch.save(found, out)
    leave_world()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
