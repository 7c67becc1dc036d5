"""Layers are recognised by what they compute: names would give Gemma 4 Gemma 3's norm, and Qwen 3.5 Qwen 3's."""

import pytest
import torch
from torch import nn

from ft_dist.model.anatomy.probe import NormForm, is_gated_mlp, is_linear, norm_form
from ft_dist.model.fused.forward import norm_eps
from tests.families.architectures import tiny_config

CAST_FIRST, WEIGHT_FIRST, OFFSET = NormForm(0.0, True), NormForm(0.0, False), NormForm(1.0, False)


def modules_of(model_type: str, ending: str) -> list[nn.Module]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    return [module for module in model.modules() if type(module).__name__.endswith(ending)]


@pytest.mark.parametrize(
    "model_type, form",
    [
        ("llama", CAST_FIRST),
        ("qwen3", CAST_FIRST),
        ("gemma2", OFFSET),
        ("gemma3_text", OFFSET),
        ("gemma4_text", WEIGHT_FIRST),
        ("gpt_oss", WEIGHT_FIRST),
        ("olmo2", WEIGHT_FIRST),
        ("qwen3_5_text", OFFSET),
        ("qwen3_next", OFFSET),
    ],
)
def test_norms(model_type: str, form: NormForm) -> None:
    norms = [norm for norm in modules_of(model_type, "RMSNorm") if list(norm.parameters())]
    assert norms
    assert {norm_form(norm, eps=norm_eps(norm)) for norm in norms} == {form}


def test_a_gated_norm_and_one_without_a_weight_are_left() -> None:
    [gated, *_] = modules_of("qwen3_next", "RMSNormGated")
    assert norm_form(gated, eps=1e-6) is None
    bare = next(norm for norm in modules_of("gemma4_text", "RMSNorm") if not list(norm.parameters()))
    assert norm_form(bare, eps=1e-6) is None


@pytest.mark.parametrize(
    "model_type, activation, gated",
    [
        ("llama", "silu", True),
        ("phi3", "silu", True),
        ("gemma3_text", "gelu_pytorch_tanh", True),
        ("gemma3_text", "silu", False),
        ("gpt_oss", "silu", False),
        ("falcon_h1", "silu", False),
    ],
)
def test_mlps(model_type: str, activation: str, gated: bool) -> None:
    mlp = modules_of(model_type, "MLP")[0]
    if model_type == "falcon_h1":
        mlp.gate_multiplier = 0.5
    assert is_gated_mlp(mlp, activation) is gated


@pytest.mark.parametrize("model_type, ending, linear", [("falcon", "Linear", True), ("llama", "Linear", True)])
def test_linear_layers(model_type: str, ending: str, linear: bool) -> None:
    assert {is_linear(module) for module in modules_of(model_type, ending)} == {linear}


def test_linear_layers_of_other_products() -> None:
    class Grouped(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.einsum("tgi,goi->tgo", input.view(-1, 2, 32), self.weight.view(2, -1, 32)).flatten(1)

    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(input)

    assert not is_linear(Grouped(8, 4))
    assert not is_linear(Scaled(8, 4))
