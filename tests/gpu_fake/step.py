"""The product's engine on the simulated device, with its own model code, DeepSpeed, optimizer and batches.

Import after `device.simulate()`.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from ft_dist.bench.shapes import SHAPES, write_shape
from ft_dist.bench.spec import make_spec
from ft_dist.bench.synthetic import SyntheticStore, VocabularyOnly, median_of
from ft_dist.config import RunConfig
from ft_dist.config.load import validate
from ft_dist.data.stream.batch import MicroBatch, collate, deal
from ft_dist.data.stream.mixture import MixtureSource
from ft_dist.data.stream.stream import DataStream
from ft_dist.distributed import World
from ft_dist.engine.build import build_engine
from ft_dist.engine.step import Engine
from ft_dist.model.fused import fuse
from ft_dist.model.load import random_model
from ft_dist.model.tiny import tiny_config, tiny_names
from ft_dist.objective import head
from tests.gpu_fake.simulator.counting import BACKWARD, BATCH, FORWARD, UPDATE, Count, Phase
from tests.gpu_fake.simulator.device import fake_tensors

LEARNING_RATE = 1e-4
# the config of each method
METHODS: dict[str, list[str]] = {
    "full": ["method.kind=full"],
    "lora": ["method.kind=lora"],
    "lora-dropout": ["method.kind=lora", "method.dropout=0.05"],
    "rslora": ["method.kind=lora", "method.rslora=true"],
    "dora": ["method.kind=lora", "method.dora=true"],
    "lora-head": ["method.kind=lora", "method.target_modules=[o_proj,lm_head]"],
    "lora-fp8": ["method.kind=lora", "method.dropout=0.05", "model.base_dtype=fp8"],
}
# a tiny model of each family that our kernels support, wide enough for all of them
FAMILY_MODELS = {
    "llama": "tiny-llama",
    "mistral": "tiny-mistral",
    "qwen2": "tiny-qwen2",
    "qwen3": "tiny-qwen3",
    "gemma2": "tiny-gemma2",
    "gemma3": "tiny-gemma3 with vision",
    "gemma3_text": "tiny-gemma3",
    "phi3": "tiny-phi3",
}
_WIDER = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
}
_VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Setting:
    """A model, a method and its batches. `model` is a shape of `ft-dist bench`, or a tiny model of a family."""

    model: str
    method: str = "lora"
    stage: int | None = None
    ranks: int = 1
    layers: int = 2
    rows: int = 2
    length: int = 4096
    lengths: str = "full"
    labelled: float = 1.0
    overrides: tuple[str, ...] = ()

    def config(self, folder: Path) -> RunConfig:
        path = folder / "model"
        self._write(path)
        given = [*METHODS[self.method], "model.dtype=bf16", *self.overrides]
        if self.stage is not None:
            given.append(f"engine.zero_stage={self.stage}")
        # make_spec takes a folder as well as a name
        spec = make_spec(
            str(path),
            given,
            data="synthetic",
            method="lora",
            length=self.length,
            rows=self.rows * self.ranks,
            lengths=self.lengths,
            labelled=self.labelled,
            steps=1,
            checkpoint=False,
            folder=folder,
        )
        return validate(spec.tree | {"batch": {"global_rows": self.rows * self.ranks, "micro_rows": self.rows}})

    def _write(self, path: Path) -> None:
        name, _, vision = self.model.partition(" with ")
        if name in SHAPES:
            write_shape(name, path)
            shape = json.loads((path / "config.json").read_text())
        elif name in tiny_names():
            path.mkdir(parents=True, exist_ok=True)
            shape = tiny_config(name) | _WIDER
        else:
            raise SystemExit(f"{self.model}: not one of {', '.join([*SHAPES, *tiny_names()])}")
        types = shape.get("layer_types")
        if types:
            shape["layer_types"] = [types[index % len(types)] for index in range(self.layers)]
        shape["num_hidden_layers"] = self.layers
        if vision:
            shape = {"model_type": "gemma3", "text_config": shape, "vision_config": _VISION}
        (path / "config.json").write_text(json.dumps(shape))

    def vocabulary(self, config: RunConfig) -> int:
        shape = json.loads((Path(config.model.path) / "config.json").read_text())
        return int(shape.get("text_config", shape)["vocab_size"])


def form_world(ranks: int) -> World:
    """This process as rank 0 of a world whose other ranks do not exist: collectives return at once."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    assert dist.get_world_size() == ranks, "DeepSpeed keeps its groups: another world needs another process"
    # ZeRO-3 compares traces between ranks by values, which do not exist here
    coordinator.assert_ints_same_as_other_ranks = lambda _: None
    return World(0, ranks, 0, ranks, torch.device("cuda", 0))


def build(setting: Setting) -> tuple[Engine, RunConfig]:
    """The engine as `ft-dist bench` builds it. Call inside `fake_tensors()`."""
    folder = Path(tempfile.mkdtemp(prefix="gpu_fake-"))
    config = setting.config(folder)
    world = form_world(setting.ranks)
    tokenizer = VocabularyOnly(setting.vocabulary(config))
    with Count(), _probes_with_values():  # Count replaces reads of a tensor's value
        return build_engine(config, world, folder=config.model.path, tokenizer=tokenizer, load=random_model), config


@contextmanager
def _probes_with_values() -> Iterator[None]:
    """What a layer computes is found out on tensors of the probes' own, which need values."""

    def real(probe: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            with _disable_current_modes():
                return probe(*arguments, **options)

        return run

    probes = [(fuse, "norm_form"), (fuse, "is_gated_mlp"), (head, "measured_form")]
    originals = [getattr(module, name) for module, name in probes]
    for (module, name), probe in zip(probes, originals, strict=True):
        setattr(module, name, real(probe))
    try:
        yield
    finally:
        for (module, name), probe in zip(probes, originals, strict=True):
            setattr(module, name, probe)


def batches(setting: Setting, config: RunConfig) -> Iterator[list[MicroBatch]]:
    """Micro-batches of rank 0, step by step, through the product's order and packing. Real tensors on the host."""
    store = SyntheticStore(
        max_length=setting.length,
        median=median_of(setting.lengths),
        labelled=setting.labelled,
        vocabulary=setting.vocabulary(config),
        seed=config.seed,
    )
    stream = DataStream(
        [MixtureSource("synthetic", store)],
        seed=config.seed,
        global_rows=config.batch.global_rows,
        max_length=config.data.max_length,
        packing=config.data.packing,
    )
    while True:
        batch = stream.next_batch()
        dealt = deal(batch, rank=0, world=setting.ranks, micro_rows=config.batch.micro_rows)
        yield [collate(rows, stream.store, gpu_length=config.data.max_length) for rows in dealt]


def dummy(config: RunConfig) -> MicroBatch:
    """The micro-batch of a rank without rows."""
    no_store: Any = None
    return collate((), no_store, gpu_length=config.data.max_length)


@dataclass
class Step:
    """The counts of one step. `held_bytes`: what its last forward pass kept for the backward pass."""

    phases: dict[str, Phase]
    held_bytes: int
    attention: Counter[str]
    engine: Engine
    config: RunConfig


def count_step(setting: Setting, *, steps: int = 2, micro_batches: list[MicroBatch] | None = None) -> Step:
    """Counts of the last of `steps` steps; the earlier ones create the optimizer's state and other lasting objects."""
    with fake_tensors():
        engine, config = build(setting)
        with unset_fake_temporarily():
            data = [micro_batches] * steps if micro_batches else list(islice(batches(setting, config), steps))
        with Count() as count, _phases_told_apart(engine, count) as held:
            for step in data:
                count.clear()
                labelled = max(1, sum(batch.labelled_tokens for batch in step) * setting.ranks)
                engine.train_step(step, weight=labelled, learning_rate=LEARNING_RATE)
    return Step(count.phases, held[-1], count.attention, engine, config)


@contextmanager
def _phases_told_apart(engine: Engine, count: Count) -> Iterator[list[int]]:
    """Yields a list that collects the bytes kept by each forward pass."""
    held: list[int] = []
    forward, backward = engine.objective.forward, torch.autograd.backward

    def counted_forward(*args: Any, **kwargs: Any) -> Any:
        before, count.phase = count.held_bytes(), FORWARD
        loss = forward(*args, **kwargs)
        held.append(count.held_bytes() - before)
        count.phase = BATCH
        return loss

    def counted_backward(*args: Any, **kwargs: Any) -> Any:
        count.phase = BACKWARD
        backward(*args, **kwargs)
        # until the next forward pass begins, if any
        count.phase = UPDATE

    engine.objective.forward, torch.autograd.backward = counted_forward, counted_backward  # type: ignore[method-assign]
    try:
        yield held
    finally:
        torch.autograd.backward = backward


def count_attention(setting: Setting, batches_read: int) -> Counter[str]:
    """Attention calls by the key of their plan, over the forward passes of the given batches."""
    with fake_tensors():
        engine, config = build(setting)
        with unset_fake_temporarily():
            data = list(islice(batches(setting, config), batches_read))
        with Count() as count, torch.no_grad():
            for step in data:
                for batch in step:
                    engine.loss_sum(batch)
    return count.attention
