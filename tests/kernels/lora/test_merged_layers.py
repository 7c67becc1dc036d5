"""Layers of a block merged into one product, in the interpreter: values, and an otherwise unchanged model."""

import pytest
import torch

from ft_dist.method.lora import Lora
from ft_dist.model.fused import fuse as fused
from ft_dist.model.fused import merged
from tests.model.whole_models import METHODS, assert_same, batch, build, gradients

pytestmark = pytest.mark.interpreter
SIZE = {"rows": 2, "width": 16, "restart": 11}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Merge fp32 on CPU tensors as bf16 on a GPU, wherever the kernels support it."""
    from ft_dist_kernels.lora import extended as lora_extended

    def suits(members, *, dtype, device):
        return lora_extended._misfit(members, dtype) is None

    monkeypatch.setattr(fused, "chosen_backend", lambda *_, **__: "triton")
    monkeypatch.setattr(merged, "suits_extended", suits)


@pytest.fixture
def runs(monkeypatch):
    """The number of merged products that have run."""
    ran = []
    own = merged.lora_linear_extended
    monkeypatch.setattr(merged, "lora_linear_extended", lambda *a, **k: ran.append(1) or own(*a, **k))
    return ran


def layers_of(objective):
    return list(objective.causal_lm.get_decoder().layers)


@pytest.mark.parametrize(("name", "products"), [("llama", 3), ("qwen2", 3), ("gemma2", 3), ("gemma3", 2), ("phi3", 3)])
def test_loss_and_gradients_equal_hugging_faces(name, products, runs):
    own = build(f"tiny-{name}", "off", method=METHODS["lora"])[0]
    ours = build(f"tiny-{name}", "triton", method=METHODS["lora"])[0]
    assert_same(gradients(ours, **SIZE), gradients(own, **SIZE))
    assert len(runs) == products * len(layers_of(ours))


def test_layers_run_separately_if_only_some_have_adapters(runs):
    method = Lora(rank=4, alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    own, ours = (build("tiny-llama", kernels, method=method)[0] for kernels in ("off", "triton"))
    assert_same(gradients(ours, **SIZE), gradients(own, **SIZE))
    assert not runs


def test_dropout_and_checkpointing_give_the_same_bits(runs):
    method, results = Lora(rank=4, alpha=8, dropout=0.2), []
    for checkpointing in (False, True):
        objective, _ = build("tiny-llama", "triton", method=method, checkpointing=checkpointing)
        torch.manual_seed(5)
        results.append(gradients(objective, **SIZE))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], grad) for name, grad in results[1][1].items())
    assert len(runs) == (3 + 2 * 3) * len(layers_of(objective))


def weights_of(objective):
    return {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}


def test_parameters_keep_their_values_and_exist_once():
    objective, _ = build("tiny-llama", "triton", method=METHODS["lora"])
    before = weights_of(objective)
    gradients(objective, **SIZE)
    after = weights_of(objective)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    attention = layers_of(objective)[0].self_attn
    memory = {
        layer.get_base_layer().weight.untyped_storage().data_ptr() for layer in (attention.q_proj, attention.k_proj)
    }
    assert len(memory) == 1


def test_disabled_merged_or_moved_adapters_give_the_plain_model(tmp_path):
    own, ours = (build("tiny-llama", kernels, method=METHODS["lora"])[0].eval() for kernels in ("off", "triton"))
    with torch.no_grad():
        ours(**batch(**SIZE))  # merges the weights

        def assert_equal():
            torch.testing.assert_close(ours(**batch(**SIZE)), own(**batch(**SIZE)), rtol=1e-5, atol=0)

        with own.model.disable_adapter(), ours.model.disable_adapter():
            assert_equal()
        for model in (own.model, ours.model):
            model.merge_adapter()
        assert_equal()
        for model in (own.model, ours.model):
            model.unmerge_adapter()
        assert_equal()
        ours.model.to(torch.float64).to(torch.float32)  # outside the buffer
        assert_equal()
        ours.model.save_pretrained(tmp_path / "adapter")
        plain = ours.model.merge_and_unload()
        ids = batch(**SIZE)["input_ids"]
        torch.testing.assert_close(plain(ids).logits, own.model.merge_and_unload()(ids).logits, rtol=1e-4, atol=1e-5)


def test_generation_uses_a_cache():
    own, ours = (build("tiny-llama", kernels, method=METHODS["lora"])[0].eval() for kernels in ("off", "triton"))
    ids = batch(**SIZE)["input_ids"]
    generated = [
        one.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=True) for one in (own, ours)
    ]
    assert torch.equal(*generated)
