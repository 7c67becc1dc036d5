"""Measures whether an engine's model computes what transformers' own model does, on a few short samples.

Works on the engine's own ranks, kernels and ZeRO stage; nothing that training reads changes. All ranks call every
function in the same order, because at stage 3 each forward gathers weights. Losses are sums over labelled tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ft_dist.data.stream.batch import MicroBatch, collate
from ft_dist.engine.digests import persistent_buffers
from ft_dist.engine.step import Engine
from ft_dist.model.fused.fuse import own_forwards
from ft_dist.resources import is_out_of_memory

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError)
"""What a model's code raises for inputs that it does not take"""


@dataclass(frozen=True)
class Probe:
    """A sample: token ids (T,) and whether each is labelled (T,)."""

    tokens: np.ndarray
    mask: np.ndarray

    @property
    def labels(self) -> int:
        return int(self.mask[1:].sum())

    def with_another_end(self) -> "Probe":
        """The last token is another one, which is not labelled either."""
        assert not self.mask[-1]
        last = self.tokens[0] if self.tokens[0] != self.tokens[-1] else self.tokens[1]
        return replace(self, tokens=np.concatenate([self.tokens[:-1], [last]]))

    def unlabelled(self) -> "Probe":
        return replace(self, mask=np.zeros_like(self.mask))

    def reversed(self) -> "Probe":
        return replace(self, tokens=self.tokens[::-1].copy())

    def rolled(self) -> "Probe":
        return replace(self, tokens=np.roll(self.tokens, 1))


class _Samples:
    """What `collate` reads of a store."""

    def __init__(self, samples: Sequence[Probe]) -> None:
        self._samples = samples

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        taken = [self._samples[index] for index in ids.tolist()]
        tokens = np.concatenate([one.tokens for one in taken]).astype(np.int64)
        lengths = np.array([len(one.tokens) for one in taken], np.int64)
        return tokens, np.concatenate([one.mask for one in taken]), lengths

    def sequences_of(self, ids: np.ndarray) -> None:
        return None


def batch_of(engine: Engine, rows: Sequence[Sequence[Probe]]) -> MicroBatch:
    """A micro-batch of packed rows, made as in training."""
    samples = [one for row in rows for one in row]
    numbers = iter(range(len(samples)))
    gpu_length = engine.config.data.max_length if engine.world.device.type == "cuda" else None
    store: Any = _Samples(samples)
    return collate([[next(numbers) for _ in row] for row in rows], store, gpu_length=gpu_length)


def training_loss(engine: Engine, *rows: Sequence[Probe]) -> float:
    """The objective's loss of packed rows, without dropout."""
    return float(engine.loss_sum(batch_of(engine, rows)))


def own_losses(engine: Engine, sample: Probe, *, noise_seed: int | None = None) -> torch.Tensor:
    """Cross-entropy (labels,) from the logits of transformers' own model, without adapters, of one sample alone.

    With `noise_seed`, embeddings move at random by up to half a rounding step of the model's dtype: the changes
    are a measure of what the dtype can resolve.
    """
    with torch.no_grad(), _own_model(engine), _noise(engine, noise_seed):
        return _own_losses(engine, sample).double().cpu()


def _own_losses(engine: Engine, sample: Probe) -> torch.Tensor:
    ids = torch.from_numpy(sample.tokens.astype(np.int64))[None].to(engine.world.device)
    logits = engine.objective.causal_lm(input_ids=ids, use_cache=False).logits[0, :-1].float()
    labelled = torch.from_numpy(sample.mask[1:]).to(engine.world.device)
    return F.cross_entropy(logits[labelled], ids[0, 1:][labelled], reduction="none")


def own_objective(engine: Engine, sample: Probe, *, otherwise: float) -> float:
    """The loss per label that transformers' own model computes when it gets labels; `otherwise` if it computes none.

    Beyond cross-entropy, it holds what the model adds in training, such as an auxiliary loss of its routers.
    """
    ids = torch.from_numpy(sample.tokens.astype(np.int64))[None].to(engine.world.device)
    labels = ids.masked_fill(~torch.from_numpy(sample.mask)[None].to(ids.device), -100)
    try:
        with torch.no_grad(), _own_model(engine):
            loss = engine.objective.causal_lm(input_ids=ids, labels=labels, use_cache=False).loss
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        return otherwise
    return otherwise if loss is None else float(loss)


def changed_buffers(engine: Engine, sample: Probe) -> list[str]:
    """Names of the buffers in the model's state that a forward in training changes; they get their values back."""
    before = {name: buffer.detach().clone() for name, buffer in persistent_buffers(engine.objective.model)}
    if not before:
        return []
    engine.objective.train()
    try:
        with torch.no_grad():
            engine.objective(**batch_of(engine, [[sample]]).to(engine.world.device).inputs())
    finally:
        engine.objective.eval()
    now = dict(persistent_buffers(engine.objective.model))
    changed = [name for name, old in before.items() if not torch.equal(now[name], old)]
    for name in changed:
        now[name].copy_(before[name])
    return changed


def unreached(engine: Engine, sample: Probe) -> list[str]:
    """Names of trainable parameters to which no gradient of the objective's loss can flow."""
    engine.objective.eval()
    inputs = batch_of(engine, [[sample]]).to(engine.world.device).inputs()
    with torch.enable_grad():
        reached = _leaves(engine.objective(**inputs))
    return [name for name, parameter in engine.trainable() if parameter not in reached]


def own_unreached(engine: Engine, sample: Probe) -> list[str]:
    """The same for transformers' (and peft's) own forward."""
    engine.objective.eval()
    with torch.enable_grad(), own_forwards(engine.fused):
        reached = _leaves(_own_losses(engine, sample))
    return [name for name, parameter in engine.trainable() if parameter not in reached]


def _leaves(loss: torch.Tensor) -> set[torch.Tensor]:
    """The parameters in the graph behind `loss`."""
    found: set[torch.Tensor] = set()
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


@contextmanager
def _own_model(engine: Engine) -> Iterator[None]:
    model: Any = engine.objective.model
    engine.objective.eval()
    with own_forwards(engine.fused), model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        yield


@contextmanager
def _noise(engine: Engine, seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return

    def move(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        moves = torch.rand(output.shape, generator=draw).to(output.device) - 0.5
        return (output.float() * (1 + moves * torch.finfo(output.dtype).eps)).to(output.dtype)

    hook = engine.objective.causal_lm.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()
