"""New tokens train in embedding and head: our forward against peft's, in the fused loss and the plain one."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ft_dist.errors import ModelError
from ft_dist.method.lora import Lora
from ft_dist.model.builtin import resolve_model
from ft_dist.model.fused.fuse import fuse
from ft_dist.model.parts.layers import layers_of
from ft_dist.model.parts.new_tokens import run_token_rows
from ft_dist.objective.causal import CausalObjective
from ft_dist.objective.head import MAX_TOKEN_ROWS
from tests.families.architectures import tiny_config
from tests.model.whole_models import assert_same, gradients

IDS = [17, 200, 201, 258]


def build(name, *, ours, kernels="off", ids=IDS, **options):
    """`ours` replaces peft's forward of embedding and head."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32)
    model = Lora(rank=4, alpha=8, **options).adapt(model, layers_of(model), new_token_ids=ids)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    causal_lm = model.get_base_model()
    if ours:
        run_token_rows(causal_lm)
    report = fuse(causal_lm, kernels=kernels, device_type="cpu", zero3=False)
    objective = CausalObjective(model, fused=report.head_backend, by_segment=report.segments)
    report.add_head(objective.head.reason_unfused())
    return objective.train(), report


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-smollm", "tiny-gemma2"])
@pytest.mark.parametrize("kernels", ["off", "torch"])
def test_loss_and_gradients_equal_pefts(name, kernels):
    (own, _), (objective, report) = build(name, ours=False), build(name, ours=True, kernels=kernels)
    found = gradients(objective)
    assert_same(found, gradients(own))
    rows = [name for name in found[1] if "trainable_tokens_delta" in name]
    assert len(rows) == 2 if name == "tiny-llama" else 1
    assert report.fused["output head with loss"] == (kernels == "torch")
    ids = torch.tensor([[3, *IDS, 5]])
    with torch.no_grad():
        torch.testing.assert_close(objective.model.eval()(ids).logits, own.model.eval()(ids).logits)


@pytest.mark.parametrize(
    "name, options",
    [
        ("tiny-llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("tiny-llama", {"modules_to_save": ["lm_head", "norm"]}),
        ("tiny-llama", {"modules_to_save": ["embed_tokens"]}),
        ("tiny-smollm", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_a_head_that_trains_otherwise_is_fused_too(name, options):
    own, _ = build(name, ours=False, **options)
    objective, report = build(name, ours=True, kernels="torch", **options)
    assert_same(gradients(objective), gradients(own))
    assert report.fused["output head with loss"] == 1


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("tiny-smollm", {"target_modules": ["q_proj", "lm_head"]}, "output head with LoRA and rows of new tokens"),
        ("tiny-llama", {"ids": list(range(MAX_TOKEN_ROWS + 1))}, "output head with 65 new tokens, over 64"),
    ],
)
def test_what_the_kernel_cannot_compute_is_reported(name, options, reason):
    own, _ = build(name, ours=False, **options)
    objective, report = build(name, ours=True, kernels="torch", **options)
    assert_same(gradients(objective), gradients(own))
    assert reason in report.left


def test_a_heads_bias_is_kept():
    """peft's own forward leaves it out."""
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.PhiConfig(**sizes, num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    nn.init.normal_(base.lm_head.bias)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        truth = base.eval()(ids).logits
        adapted = Lora(rank=4).adapt(base, layers_of(base), new_token_ids=[5, 6])
        run_token_rows(adapted)
        torch.testing.assert_close(adapted.eval()(ids).logits, truth)


@pytest.mark.parametrize("model_type", ["xglm", "biogpt", "gemma3_text"])
def test_rows_are_scaled_as_their_embedding_is(model_type):
    """By a number or a tensor."""
    base = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        truth = base(ids).logits
        adapted = Lora(rank=4).adapt(base, layers_of(base), new_token_ids=[5, 6]).eval()
        run_token_rows(adapted)
        torch.testing.assert_close(adapted(ids).logits, truth)


def test_tied_ends_train_whole_only_together():
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny-smollm"))
    with pytest.raises(ModelError, match=r"modules_to_save=lm_head: with model.new_tokens, .* Name model.embed_tokens"):
        Lora(modules_to_save=["lm_head"]).adapt(model, layers_of(model), new_token_ids=[17])
