"""The same samples in one global batch, packed or one per row, give the same loss and gradients in fp32."""

import numpy as np
import pytest
import torch

from ft_dist.config.schema import ModelConfig
from ft_dist.data.stream.batch import collate, deal
from ft_dist.data.stream.mixture import MixtureSource
from ft_dist.data.stream.stream import DataStream
from ft_dist.method.lora import Lora
from ft_dist.model.builtin import resolve_model
from ft_dist.model.fused.fuse import fuse
from ft_dist.model.load import load_model
from ft_dist.model.parts.layers import layers_of
from ft_dist.objective.causal import CausalObjective
from tests.data.stores import ListStore, random_store


def build(kind: str, kernels: str) -> CausalObjective:
    settings = ModelConfig(path="tiny-llama", dtype="fp32", kernels=kernels)
    torch.manual_seed(0)
    model, _ = load_model(settings, folder=resolve_model("tiny-llama"), vocabulary=1)
    if kind != "full":
        model = Lora(rank=4).adapt(model, layers_of(model))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # B is zero at the start, which would make A's gradients zero
                    parameter.normal_(std=0.05)
    causal_lm = model.get_base_model() if kind != "full" else model
    report = fuse(causal_lm, kernels=kernels, device_type="cpu", zero3=False)
    return CausalObjective(model, fused=report.head_backend, by_segment=report.segments)


def loss_and_gradients(objective, store, micro_batches, *, gpu_length=None):
    objective.zero_grad()
    total, labelled = 0.0, 0
    for rows in micro_batches:
        batch = collate(rows, store, gpu_length=gpu_length)
        loss = objective.loss(batch)
        loss.backward()
        total, labelled = total + float(loss.detach()), labelled + batch.labelled_tokens
    gradients = {n: p.grad / labelled for n, p in objective.named_parameters() if p.grad is not None}
    return total / labelled, gradients


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("kernels", ["off", "torch"])
def test_packed_equals_one_sample_per_row(kind, kernels):
    store = random_store(60, 40)
    stream = DataStream([MixtureSource("a", store)], seed=0, global_rows=6, max_length=96, packing=True)
    batch = stream.next_batch()
    assert batch.samples > 2 * len(batch.rows)
    objective = build(kind, kernels)
    packed, padded = [], [[[sample] for sample in batch.sample_ids]]
    for rank in range(2):
        packed += deal(batch, rank=rank, world=2, micro_rows=2)
    loss, gradients = loss_and_gradients(objective, store, packed)
    expected_loss, expected = loss_and_gradients(objective, store, padded)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()))


def chats_with_one_system_prompt() -> ListStore:
    """Nine samples: a system prompt of 30 tokens, one of two questions, answers of different lengths, an end token."""
    chance = np.random.default_rng(0)
    system, questions = chance.integers(1, 200, 30).tolist(), chance.integers(1, 200, (2, 9)).tolist()
    samples = []
    for number in range(9):
        answer = chance.integers(1, 200, 3 + 5 * number).tolist()
        tokens = [*system, *questions[number % 2], *answer, 7]
        samples.append((tokens, [False] * 39 + [True] * len(answer) + [False]))
    return ListStore(samples)


@pytest.mark.parametrize("gpu_length", [None, 512])
@pytest.mark.parametrize("rows", [[[0, 1, 2], [3, 4, 5, 6], [7, 8]], [[number] for number in range(9)]])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_shared_prefixes_run_once_and_count_for_every_sample(kind, rows, gpu_length):
    """With the inputs of a CPU and of a GPU."""
    store = chats_with_one_system_prompt()
    objective = build(kind, "torch")
    together = collate(rows, store)
    assert len(together.kept) < 0.5 * together.real_tokens
    loss, gradients = loss_and_gradients(objective, store, [rows], gpu_length=gpu_length)
    expected_loss, expected = loss_and_gradients(objective, store, [[[number]] for number in range(9)])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()))


def test_leaks_between_samples_would_be_detected():
    """The test above can fail: without restarting positions the loss differs."""
    store = random_store(60, 40)
    objective = build("full", "off")
    batch = collate([[0, 1, 2]], store)
    joined = torch.arange(batch.input_ids.shape[1])[None]
    with torch.no_grad():
        apart, together = objective.loss(batch), objective(batch.input_ids, batch.labels, joined)
    assert abs(float(apart - together)) > 1e-3 * float(apart)
