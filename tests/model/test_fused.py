"""Whole models on our kernels against Hugging Face's own forward and backward: loss and every gradient."""

import pytest
import torch
from ft_dist_kernels.segments import find_segments

from ft_dist.config.schema import MethodConfig
from ft_dist.errors import ModelError
from ft_dist.loss import CausalObjective
from ft_dist.model.builtin import resolve_model
from ft_dist.model.fused import chosen_backend, fuse
from ft_dist.model.load import add_adapters, enable_activation_checkpointing
from ft_dist.model.tiny import tiny_names


def build(name, kernels, *, method=None, dtype=torch.float32, checkpointing=False, nonzero=True):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=dtype)
    if checkpointing:
        enable_activation_checkpointing(model)
    if method is not None:
        model = add_adapters(model, method)
        for parameter_name, parameter in model.named_parameters():
            if nonzero and "lora_B" in parameter_name:
                # B starts at zero, which would hide every mistake in A's gradient
                torch.nn.init.normal_(parameter, std=0.05)
    causal_lm = model.get_base_model() if method is not None else model
    report = fuse(causal_lm, kernels=kernels, device_type="cpu", zero3=False)
    objective = CausalObjective(model, fused=report.head_backend, by_segment=report.segments)
    report.add_head(objective.head.reason_unfused())
    return objective.train(), report


def batch(rows=2, width=32, restart=20):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 250, (rows, width + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, :9] = -100
    positions = torch.arange(width).repeat(rows, 1)
    positions[:, restart:] -= restart
    rows_of = {"input_ids": ids[:, :-1].contiguous(), "labels": labels, "position_ids": positions}
    return rows_of | {"kept": torch.arange(rows * width), "segments": find_segments(positions)}


def gradients(objective, **size):
    loss = objective(**batch(**size))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}


METHODS = {
    "full": None,
    "lora": MethodConfig(rank=4, alpha=8),
    "rslora": MethodConfig(rank=4, alpha=8, rslora=True),
    "dora": MethodConfig(rank=4, alpha=8, dora=True),
    "head": MethodConfig(rank=4, alpha=8, target_modules=["q_proj", "qkv_proj", "down_proj", "lm_head"]),
}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", tiny_names())
def test_loss_and_gradients_are_hugging_faces_own(name, method):
    own, ours = build(name, "off", method=METHODS[method])[0], build(name, "torch", method=METHODS[method])[0]
    (loss, grads), (fused_loss, fused_grads) = gradients(own), gradients(ours)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0)
    assert fused_grads.keys() == grads.keys()
    for parameter, grad in grads.items():
        assert (fused_grads[parameter] - grad).norm() <= 2e-5 * grad.norm() + 1e-7, parameter


@pytest.mark.parametrize("name", ["tiny-mistral", "tiny-gemma3", "tiny-phi3", "tiny-llama"])
def test_samples_longer_than_a_sliding_window(name):
    own, ours = build(name, "off")[0], build(name, "torch")[0]
    size = {"rows": 1, "width": 150, "restart": 110}
    (loss, grads), (fused_loss, fused_grads) = gradients(own, **size), gradients(ours, **size)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0)
    for parameter, grad in grads.items():
        assert (fused_grads[parameter] - grad).norm() <= 2e-5 * grad.norm() + 1e-7, parameter


def test_attention_goes_by_segments_where_it_can():
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
    method = MethodConfig(rank=4, alpha=8, dropout=0.2)
    results = []
    for checkpointing in (False, True):
        objective, _ = build("tiny-llama", "torch", method=method, checkpointing=checkpointing)
        torch.manual_seed(5)
        results.append(gradients(objective))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], grad) for name, grad in results[1][1].items())


def test_two_runs_give_the_same_bits():
    first, second = (gradients(build("tiny-qwen3", "torch", method=METHODS["lora"])[0]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], grad) for name, grad in second[1].items())


def test_dropout_keeps_the_expected_output():
    method = MethodConfig(rank=4, alpha=8, dropout=0.1)
    objective, _ = build("tiny-llama", "torch", method=method)
    objective.eval()
    plain = objective(**batch()).item()
    objective.train()
    dropped = torch.tensor([objective(**batch()).item() for _ in range(64)])
    assert dropped.std() > 0
    assert abs(dropped.mean().item() - plain) < 4 * dropped.std().item() / 8 + 0.02 * plain


def test_the_report_names_what_runs_and_what_does_not():
    report = build("tiny-smollm", "torch", method=METHODS["head"])[1]
    line = report.line()
    for part in ("attention (qkv, rotary)", "LoRA linears", "gated MLP", "RMSNorm", "output head with loss"):
        assert part in line
    assert "left" not in line
    assert build("tiny-llama", "off")[1].line() == "kernels: off, Hugging Face's own layers run"


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


def test_classes_of_transformers_stay_untouched():
    from transformers.models.llama import modeling_llama

    before = modeling_llama.LlamaAttention.forward, modeling_llama.LlamaMLP.forward
    build("tiny-llama", "torch")
    assert (modeling_llama.LlamaAttention.forward, modeling_llama.LlamaMLP.forward) == before
