"""Whole models with a base held in FP8: the same layers, nearly the same gradients, and no base weight left in bf16."""

import pytest
import torch
from torch import nn

from ft_dist.config.load import validate
from ft_dist.config.schema import ModelConfig
from ft_dist.errors import ConfigError, ModelError
from ft_dist.method.lora import Lora
from ft_dist.model.builtin import resolve_model
from ft_dist.model.fp8 import FP8Linear, held_elements, hold_base_in_fp8, refuse_without_fp8
from ft_dist.model.fused.fuse import fuse
from ft_dist.model.parts.layers import layers_of
from ft_dist.model.tiny import tiny_names
from ft_dist.objective.causal import CausalObjective
from tests.model.test_fused import batch, build, gradients

METHOD = Lora(rank=4, alpha=8)


def build_in_fp8(name, kernels, *, method=METHOD, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=dtype)
    model = method.adapt(model, layers_of(model))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.05)
    causal_lm = model.get_base_model()
    in_fp8 = hold_base_in_fp8(causal_lm)
    report = fuse(causal_lm, kernels=kernels, device_type="cpu", zero3=False)
    objective = CausalObjective(model, fused=report.head_backend, by_segment=report.segments)
    return objective.train(), report, in_fp8


def cosine(ours, theirs):
    flat = [torch.cat([grads[name].flatten().float() for name in sorted(theirs)]) for grads in (ours, theirs)]
    return float(nn.functional.cosine_similarity(*flat, dim=0))


@pytest.mark.parametrize("name", tiny_names())
def test_every_family_trains_the_same_way(name):
    resolve_model(name)  # loading draws random numbers the first time, and both models need the same adapters
    truth = gradients(build(name, "torch", method=METHOD)[0])
    objective, report, in_fp8 = build_in_fp8(name, "torch")
    loss, grads = gradients(objective)
    assert grads.keys() == truth[1].keys()
    assert all("lora" in key for key in grads)
    assert abs(loss - truth[0]) < 0.02 * truth[0]
    assert cosine(grads, truth[1]) > 0.96
    assert not report.left
    assert not in_fp8.left
    assert in_fp8.held == report.fused["LoRA linears"] == (8 if name == "tiny-phi3" else 14)
    # peft's own forward on the same layers
    off_loss, off = gradients(build_in_fp8(name, "off")[0])
    assert abs(off_loss - loss) < 1e-3 * loss
    assert cosine(off, grads) > 0.995


def test_no_base_weight_stays_in_its_own_dtype():
    plain, objective = build("tiny-qwen2", "torch", method=METHOD)[0], build_in_fp8("tiny-qwen2", "torch")[0]
    linears = {name for name, module in plain.named_modules() if name.endswith("base_layer")}
    assert {name for name, module in objective.named_modules() if isinstance(module, FP8Linear)} == linears
    left = {name for name, _ in objective.named_parameters()}
    assert not any(f"{name}.weight" in left for name in linears)
    assert any(name.endswith("q_proj.base_layer.bias") for name in left)
    held = held_elements(objective)
    assert held == sum(p.numel() for n, p in plain.named_parameters() if n.removesuffix(".weight") in linears)
    count = sum(p.numel() for p in plain.parameters())
    assert held + sum(p.numel() for p in objective.parameters()) == count
    # a cast of the whole module, as DeepSpeed does, does not change the codes
    layer = next(module for module in objective.modules() if isinstance(module, FP8Linear))
    before = layer.weight.matrix
    objective.bfloat16()
    assert layer.weight.matrix is before
    assert before.output_scale.dtype == torch.float32


def test_groups_share_a_matrix_and_layers_without_adapters_are_also_in_fp8():
    objective, _, in_fp8 = build_in_fp8(
        "tiny-llama", "torch", method=METHOD.model_copy(update={"target_modules": ["o_proj"]})
    )
    assert in_fp8.held == 14
    layer = objective.causal_lm.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    matrix = attention.q_proj.weight.matrix
    assert matrix is attention.k_proj.weight.matrix is attention.v_proj.weight.matrix
    assert (attention.v_proj.weight.begin, attention.v_proj.weight.end) == (96, 128)
    assert mlp.gate_proj.weight.matrix is mlp.up_proj.weight.matrix is not mlp.down_proj.weight.matrix
    assert isinstance(attention.o_proj.get_base_layer(), FP8Linear)
    loss = objective(**batch())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters() if p.requires_grad)


def test_a_layer_with_unsupported_sizes_is_skipped_and_named():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(resolve_model("tiny-llama"), intermediate_size=168)
    causal_lm = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    report = hold_base_in_fp8(causal_lm)
    assert report.held == 8
    assert report.left == {"168 x 64, not multiples of 16": 4, "64 x 168, not multiples of 16": 2}
    assert "8 linears; 4 unchanged: 168 x 64" in report.line()
    assert type(causal_lm.model.layers[0].mlp.up_proj) is nn.Linear


def test_an_unknown_architecture_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ModelError, match=r"base_dtype=fp8: architecture gpt2 is not supported"):
        hold_base_in_fp8(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)))


def test_a_gpu_without_fp8_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    model, gpu = ModelConfig(path="m", base_dtype="fp8"), torch.device("cuda", 0)
    with pytest.raises(ModelError, match=r"A100 has compute capability 8.0; FP8 needs 8.9"):
        refuse_without_fp8(model, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("ft_dist_kernels.quantised.fp8._refusal_of_product", lambda device: None)
    refuse_without_fp8(model, gpu)
    with pytest.raises(ModelError, match=r"model\.dtype=fp32"):
        refuse_without_fp8(model.model_copy(update={"dtype": "fp32"}), gpu)
    refuse_without_fp8(model.model_copy(update={"dtype": "fp32"}), torch.device("cpu"))


@pytest.mark.parametrize(
    "section, message",
    [
        ({"method": {"kind": "full"}}, "method.kind=full trains every weight; use method.kind=lora"),
        ({"method": {"dora": True}}, "cannot be used with method.dora=true"),
        ({"engine": {"zero_stage": 3}}, "needs engine.zero_stage=auto, 0, 1 or 2"),
        ({"model": {"path": "m", "base_dtype": "fp4"}}, "should be 'fp8'"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(section, message):
    tree = {"model": {"path": "m", "base_dtype": "fp8"}, "data": {"train": ["a.jsonl"]}, "output_dir": "runs/x"}
    assert validate(tree).model.base_dtype == "fp8"
    with pytest.raises(ConfigError) as error:
        validate({**tree, **section})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
