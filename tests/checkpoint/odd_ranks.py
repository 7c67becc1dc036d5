"""One rank that trains, saves and loads a model with odd parameters at every ZeRO stage.

`python -m tests.checkpoint.odd_ranks train FOLDER`: at each stage two steps and a commit, then both once more.
`python -m tests.checkpoint.odd_ranks continue FOLDER`: loads the first commit of each stage at another stage, commits
it again unchanged, and once more after two steps. The commits of stage N are steps N2 and N4.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ft_dist.checkpoint.commit.format import commits
from ft_dist.checkpoint.commit.retention import Retention
from ft_dist.checkpoint.commit.writer import CheckpointWriter
from ft_dist.checkpoint.load import load
from ft_dist.config import load_config
from ft_dist.distributed import World, barrier, join_world, leave_world
from ft_dist.engine.fragments import adam_step, owned_tensors
from ft_dist.engine.step import Engine
from ft_dist.model.quiet import quiet_process, quietly
from ft_dist.network.open import open_store

VOCABULARY, HIDDEN = 11, 7
ROWS, TOKENS = 6, 5
STAGES = (0, 1, 2, 3)


@dataclass
class Batch:
    """The part of a micro-batch that `Engine.train_step` uses."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch":
        return self

    def inputs(self) -> dict[str, torch.Tensor]:
        return vars(self)


class Odd(torch.nn.Module):
    """Sizes that no world size divides, an output head tied to the embedding, and parameters without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.unused_first = torch.nn.Parameter(torch.randn(13))
        self.embed = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.mix = torch.nn.Linear(HIDDEN, HIDDEN)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.unused = torch.nn.Linear(3, 5)
        self.frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embed(input_ids))) * self.scale)


class Objective(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def metrics(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {}

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids)
        return torch.nn.functional.cross_entropy(logits.view(-1, VOCABULARY), labels.reshape(-1), reduction="sum")


def make_engine(folder: Path, stage: int, world: World) -> Engine:
    settings = ["model.dtype=fp32", "method.kind=full", "optim.weight_decay=0.1", f"engine.zero_stage={stage}"]
    torch.manual_seed(0)
    with quietly():
        return Engine(Objective(Odd()), load_config("smoke", [*settings, f"output_dir={folder}"]), world)  # type: ignore[arg-type]


def train(engine: Engine, steps: range) -> None:
    world = engine.world
    for step in steps:
        tokens = torch.randint(VOCABULARY, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(step))
        mine = tokens[world.rank :: world.size]
        batch = Batch(mine[:, :-1], mine[:, 1:], torch.arange(TOKENS).expand(len(mine), -1))
        engine.train_step([batch], weight=ROWS * TOKENS, learning_rate=0.05)  # type: ignore[list-item]


def save(engine: Engine, writer: CheckpointWriter, step: int) -> None:
    state = {"step": step, "adam_step": adam_step(engine), "parameters": engine.trainable_shapes()}
    writer.save(owned_tensors(engine), step=step, state=state)
    writer.wait()
    barrier(engine.world)


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    quiet_process()
    import deepspeed
    from deepspeed.ops.op_builder import ShareMemCommBuilder

    world = join_world(open_store(timeout_s=120), timeout_s=120)
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed(verbose=False)
    writer = CheckpointWriter(folder / what, world, retention=Retention(100), timeout_s=60)
    for stage in STAGES:
        if what == "train":
            engine = make_engine(folder, stage, world)
            train(engine, range(2))
        else:
            engine = make_engine(folder, loading_stage(stage), world)
            load(engine, next(commit for commit in commits(folder / "train") if commit.step == 10 * stage + 2))
        save(engine, writer, 10 * stage + 2)
        train(engine, range(2, 4))
        save(engine, writer, 10 * stage + 4)
    writer.close()
    leave_world()


def loading_stage(saved: int) -> int:
    return (saved + 3) % len(STAGES)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
