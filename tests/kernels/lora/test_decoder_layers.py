"""Whole models on the Triton kernels against Hugging Face's own forward and backward, in the interpreter."""

import pytest
import torch

from ft_dist.model.fused import fuse as fused
from ft_dist.model.tiny import tiny_names
from tests.model.whole_models import METHODS, assert_same, build, gradients

pytestmark = pytest.mark.interpreter
SIZE = {"rows": 2, "width": 16, "restart": 11}


@pytest.fixture(autouse=True)
def _triton_on_cpu_tensors(monkeypatch):
    monkeypatch.setattr(fused, "chosen_backend", lambda *_, **__: "triton")


CASES = [(name, "lora") for name in tiny_names()] + [(f"tiny-{name}", "full") for name in ("llama", "gemma3", "phi3")]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_loss_and_gradients_equal_hugging_faces(name, method):
    own, ours = build(name, "off", method=METHODS[method])[0], build(name, "triton", method=METHODS[method])[0]
    assert_same(gradients(ours, **SIZE), gradients(own, **SIZE))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointed_layers_give_the_same_bits(method):
    """So does a product that the backward pass recomputes: checkpointed layers keep theirs while they run."""
    results = []
    for checkpointing in (False, True):
        objective, _ = build("tiny-llama", "triton", method=METHODS[method], checkpointing=checkpointing)
        results.append(gradients(objective, **SIZE))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], grad) for name, grad in results[1][1].items())
