"""Whole models on our kernels against Hugging Face's own forward and backward: loss and every gradient."""

import pytest
import torch

from ft_dist.errors import ModelError
from ft_dist.method.lora import Lora
from ft_dist.model.fused.fuse import chosen_backend, fuse
from ft_dist.model.tiny import tiny_names
from ft_dist.objective.causal import CausalObjective
from tests.model.whole_models import METHODS, assert_same, batch, build, gradients


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", tiny_names())
def test_loss_and_gradients_equal_hugging_faces(name, method):
    own, ours = build(name, "off", method=METHODS[method])[0], build(name, "torch", method=METHODS[method])[0]
    assert_same(gradients(ours), gradients(own))


@pytest.mark.parametrize("name", ["tiny-mistral", "tiny-gemma3", "tiny-phi3", "tiny-llama"])
def test_samples_longer_than_a_sliding_window(name):
    own, ours = build(name, "off")[0], build(name, "torch")[0]
    size = {"rows": 1, "width": 150, "restart": 110}
    assert_same(gradients(ours, **size), gradients(own, **size))


def test_attention_uses_segments_where_possible():
    by_segment = {name: build(name, "torch")[1].segments for name in tiny_names()}
    assert not by_segment.pop("tiny-gemma2"), "its attention scores are soft-capped"
    assert all(by_segment.values())


@pytest.mark.parametrize("method", ["rslora", "dora", "head"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-smollm", "tiny-phi3"])
def test_kinds_of_adapters(name, method):
    own, ours = build(name, "off", method=METHODS[method])[0], build(name, "torch", method=METHODS[method])[0]
    (loss, grads), (fused_loss, fused_grads) = gradients(own), gradients(ours)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0)
    for parameter, grad in grads.items():
        assert (fused_grads[parameter] - grad).norm() <= 2e-5 * grad.norm() + 1e-7, parameter


def test_checkpointed_blocks_give_the_same_bits_with_dropout():
    method = Lora(rank=4, alpha=8, dropout=0.2)
    results = []
    for checkpointing in (False, True):
        objective, _ = build("tiny-llama", "torch", method=method, checkpointing=checkpointing)
        torch.manual_seed(5)
        results.append(gradients(objective))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], grad) for name, grad in results[1][1].items())


def test_checkpointed_layers_run_again_in_backward():
    """Depending on its version, transformers checkpoints inside or around `forward`; our forward must do it exactly
    once."""
    for checkpointing, runs in ((False, 1), (True, 2)):
        objective, _ = build("tiny-llama", "torch", checkpointing=checkpointing)
        layers, ran = objective.causal_lm.get_decoder().layers, []
        for layer in layers:
            layer.self_attn.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        gradients(objective)
        assert len(ran) == runs * len(layers)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])
def test_hidden_states_equal_hugging_faces(name):
    rows = batch()
    results = [
        build(name, kernels)[0].causal_lm(
            input_ids=rows["input_ids"], position_ids=rows["position_ids"], output_hidden_states=True, use_cache=False
        )
        for kernels in ("off", "torch")
    ]
    own, ours = ([*result.hidden_states, result.logits] for result in results)
    assert len(own) > 3
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_residual_dropout_is_kept():
    """Phi-3's; a rate of 1 removes everything that the layers add."""
    objective, _ = build("tiny-phi3", "torch")
    decoder = objective.causal_lm.get_decoder()
    for layer in decoder.layers:
        layer.resid_attn_dropout.p = layer.resid_mlp_dropout.p = 1.0
    ids = batch()["input_ids"]
    torch.testing.assert_close(decoder(input_ids=ids).last_hidden_state, decoder.norm(decoder.embed_tokens(ids)))


def test_two_runs_give_the_same_bits():
    first, second = (gradients(build("tiny-qwen3", "torch", method=METHODS["lora"])[0]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], grad) for name, grad in second[1].items())


def test_dropout_keeps_the_expected_output():
    method = Lora(rank=4, alpha=8, dropout=0.1)
    objective, _ = build("tiny-llama", "torch", method=method)
    objective.eval()
    plain = objective(**batch()).item()
    objective.train()
    dropped = torch.tensor([objective(**batch()).item() for _ in range(64)])
    assert dropped.std() > 0
    assert abs(dropped.mean().item() - plain) < 4 * dropped.std().item() / 8 + 0.02 * plain


def test_the_report_names_used_and_unused_kernels():
    report = build("tiny-smollm", "torch", method=METHODS["head"])[1]
    line = report.line()
    for part in ("attention (qkv, rotary)", "LoRA linears", "gated MLP", "RMSNorm", "output head with loss"):
        assert part in line
    assert "left" not in line
    assert build("tiny-llama", "off")[1].line() == "kernels: off, using Hugging Face's layers"


def test_an_unknown_architecture_keeps_its_layers_and_is_named():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = GPTNeoXForCausalLM(config)
    report = fuse(model, kernels="auto", device_type="cpu", zero3=False)
    assert "architecture gpt_neox, which is not among llama" in report.line()
    objective = CausalObjective(model, fused=report.head_backend)
    ids = torch.randint(0, 64, (1, 9))
    own = model(input_ids=ids[:, :-1]).logits[0]
    truth = torch.nn.functional.cross_entropy(own, ids[0, 1:], reduction="sum")
    positions = torch.arange(8)[None]
    torch.testing.assert_close(objective(ids[:, :-1], ids[:, 1:], positions), truth, rtol=1e-5, atol=1e-5)


def test_triton_without_a_gpu_is_refused():
    with pytest.raises(ModelError, match="needs a GPU"):
        chosen_backend("triton", device_type="cpu")


def test_classes_of_transformers_are_not_modified():
    from transformers.models.llama import modeling_llama

    before = modeling_llama.LlamaAttention.forward, modeling_llama.LlamaMLP.forward
    build("tiny-llama", "torch")
    assert (modeling_llama.LlamaAttention.forward, modeling_llama.LlamaMLP.forward) == before
