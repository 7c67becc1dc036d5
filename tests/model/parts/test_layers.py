"""What LoRA adapts in models with experts, recurrent layers and layers that differ, and what it says it leaves out."""

import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from ft_dist.config.schema import ModelConfig
from ft_dist.errors import ModelError
from ft_dist.method.lora import Lora
from ft_dist.model.builtin import resolve_model
from ft_dist.model.fp8 import hold_base_in_fp8
from ft_dist.model.load import outline
from ft_dist.model.parts.kinds import kinds_of
from ft_dist.model.parts.layers import layers_of
from ft_dist.model.parts.trained import trained_parts
from tests.families.architectures import tiny_config
from tests.families.multimodal import MULTIMODAL
from tests.model.parts.families import FAMILIES, make

WITH_EXPERTS = [name for name in FAMILIES if name != "gemma4"]
ROUTERS = {
    "gpt_oss": "mlp.router",
    "gemma4_moe": "router.proj",
    "granitemoehybrid": "block_sparse_moe.router",
    "jamba": "feed_forward.router",
    "lfm2_moe": "feed_forward.gate",
    "llama4": "feed_forward.router",
    "nemotron_h": "mixer.gate",
}
UNFIT = {
    "granitemoehybrid": {"mamba.out_proj"},
    "nemotron_h": {"mixer.out_proj"},
    "jamba": {"mamba.dt_proj"},
    "deepseek_v4": {"self_attn.o_a_proj"},
}


def short(name):
    return re.sub(r".*layers\.\d+\.", "", name)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_and_routers_are_found_by_structure(name):
    layers = layers_of(make(name))
    assert {short(router) for router in layers.routers} == {ROUTERS.get(name, "mlp.gate")}
    assert layers.experts
    assert all(".experts." in expert for expert in layers.experts)
    assert {short(module) for module in layers.unfit} - {short(r) for r in layers.routers} == UNFIT.get(name, set())


def built(model_type):
    return AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)


@pytest.mark.parametrize(
    "model_type, experts, routers",
    [
        (
            "jetmoe",  # its attention is a mixture too
            {"mlp.input_linear", "mlp.output_linear"}
            | {f"self_attention.experts.{name}_linear" for name in ("input", "output")},
            {"mlp.router.layer", "self_attention.experts.router.layer"},
        ),
        ("inkling_text", {"mlp.experts"}, {"mlp.gate"}),  # it has rows for shared experts too
        ("recurrent_gemma", set(), set()),
        ("xlnet", set(), set()),
    ],
)
def test_what_is_no_mixture_has_no_experts(model_type, experts, routers):
    layers = layers_of(built(model_type))
    assert {short(name).rpartition(".")[0] for name in layers.experts} == experts
    assert {short(name) for name in layers.routers} == routers
    assert routers.isdisjoint({short(name) for name in layers.linears})
    notes = Lora().check(layers)
    assert any("the experts" in note for note in notes) == bool(experts)
    if model_type == "jetmoe":
        assert "of the model's parameters and part of its attention, are left out" in notes[0]
        assert {short(name) for name in layers.linears} == {"self_attention.kv_proj"}


class ListedExperts(nn.Module):
    """As in models with their own code."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(64, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)) for _ in range(4))

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        return sum(scores[..., number, None] * expert(x) for number, expert in enumerate(self.experts))


def test_experts_in_a_list_of_modules_are_adapted():
    model = built("llama")
    for layer in model.model.layers:
        layer.mlp = ListedExperts()
    layers = layers_of(model)
    assert Lora().check(layers) == []
    assert layers.routers == tuple(f"model.layers.{number}.mlp.gate" for number in range(2))
    adapted = Lora(rank=4).adapt(model, layers)
    assert trained_parts(adapted).share("experts") == 1
    assert trained_parts(adapted).share("router") == 0


def multimodal():
    class_name, settings = MULTIMODAL["gemma3"]
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**settings))


def test_only_the_text_model_of_a_multimodal_one_is_adapted_and_counted():
    model = multimodal()
    layers = layers_of(model)
    assert not [name for name in (*layers.shapes, *layers.linears, *layers.modules) if "vision" in name]
    adapted = Lora(rank=4).adapt(model, layers)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names
    assert not [name for name in names if "vision" in name or "projector" in name]
    assert trained_parts(adapted).share("attention") == pytest.approx(1, abs=0.01)
    text = sum(p.numel() for p in adapted.get_base_model().model.language_model.parameters() if not p.requires_grad)
    assert sum(trained_parts(adapted).total.values()) == text
    ids = torch.arange(12)[None] + 6
    adapted(input_ids=ids, labels=ids, token_type_ids=torch.zeros_like(ids), use_cache=False).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["q_proj", "out_proj"]}, r"target_modules=out_proj: only parts that do not train have it"),
        ({"modules_to_save": ["vision_tower"]}, r"modules_to_save=vision_tower: .* such as model.vision_tower\."),
        ({"layers_to_transform": [5]}, "the model's layers are numbered 0 to 1"),
    ],
)
def test_a_name_of_another_part_is_refused(options, message):
    with pytest.raises(ModelError, match=message):
        Lora(**options).check(layers_of(multimodal()))


def test_another_part_may_be_excluded():
    assert Lora(exclude_modules=["vision_tower"]).check(layers_of(multimodal())) == []


def test_a_named_head_is_adapted_with_any_layers():
    """all-linear with the same layers adapts what is in them alone."""
    model = built("llama")
    method = Lora(rank=4, target_modules=["q_proj", "lm_head"], layers_to_transform=[1])
    adapted = method.adapt(model, layers_of(model))
    names = {name.partition(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert {short(name).removeprefix("base_model.model.") for name in names} == {"self_attn.q_proj", "lm_head"}


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_trains_what_it_says(name):
    model = make(name)
    layers, method = layers_of(model), Lora(rank=4)
    notes = method.check(layers)
    adapted = method.adapt(model, layers)
    parts = trained_parts(adapted)
    experts = float(layers.adapts_experts)
    assert parts.share("experts") == experts
    assert parts.share("router") == parts.share("embeddings") == parts.share("head") == 0
    if name not in UNFIT:
        assert parts.share("attention") > 0.99
        assert parts.share("MLP") in (0, 1)
    left = [note for note in notes if "the experts" in note]
    assert len(left) == (name in WITH_EXPERTS and not experts)
    if left:
        share = layers.share(layers.experts)
        assert left[0].startswith(
            f"method.target_modules=all-linear: the experts, {share:.1%} of the model's parameters"
        )
    ids = torch.arange(12)[None] + 3
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad) or (
        name == "deepseek_v4"  # its compressed keys need rows longer than the window
    )


def test_weights_in_fp8_count():
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny-llama"))
    adapted = Lora(rank=4, target_modules=["o_proj", "up_proj"]).adapt(model, layers_of(model))
    parts = trained_parts(adapted)
    hold_base_in_fp8(adapted.get_base_model())
    assert trained_parts(adapted) == parts
    assert (parts.share("attention"), parts.share("MLP")) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_the_line_of_the_trained_parts():
    model = make("gemma4_moe")
    adapted = Lora(rank=4, target_modules=["q_proj", "mlp.up_proj"]).adapt(model, layers_of(model))
    line = "attention 33%, MLP 33%, experts 0%, router 0%, embeddings 0%, norms 0%, other 0%"
    assert trained_parts(adapted).line() == line
    assert "experts 100%" in trained_parts(make("mixtral")).line()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_outline_has_the_layers_of_the_loaded_model(name, tmp_path):
    """From config.json alone."""
    model = make(name)
    model.config.save_pretrained(tmp_path)
    assert layers_of(outline(ModelConfig(path=str(tmp_path)), folder=str(tmp_path))) == layers_of(model)


def test_the_families_whose_experts_peft_adapts():
    """As the installed peft says; the tests of these families would otherwise pass with no expert adapted."""
    adapted = {name for name in WITH_EXPERTS if layers_of(make(name)).adapts_experts}
    assert {"mixtral", "qwen3_moe", "deepseek_v3"} <= adapted
    assert adapted.isdisjoint({"gpt_oss", "gemma4_text"})


@pytest.mark.parametrize(
    "name, targets, module",
    [
        ("mixtral", ["q_proj", "gate"], "mlp.gate"),
        ("gpt_oss", ["q_proj", "router"], "mlp.router"),
        ("gemma4_moe", ["q_proj", "proj"], "router.proj"),
    ],
)
def test_a_router_trains_if_it_is_named(name, targets, module):
    model = make(name)
    adapted = Lora(rank=4, target_modules=targets).adapt(model, layers_of(model))
    assert trained_parts(adapted).share("router") > 0.4
    assert any(f"{module}.lora_A" in parameter for parameter, _ in adapted.named_parameters())


def test_what_matches_some_layers_only_is_reported():
    layers = layers_of(make("gemma4"))
    assert Lora(target_modules=["q_proj", "k_proj"]).check(layers) == [
        "method.target_modules=k_proj: matches 2 of 4 layers"
    ]
    assert Lora(target_modules=["model.layers.0.self_attn.k_proj"]).check(layers) == []


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mixtral", {"target_modules": ["embed_tokens"]}, "target_modules=embed_tokens: the embedding is not a linear"),
        ("mixtral", {"target_modules": ["k_prj"]}, r"target_modules=k_prj: .* Did you mean k_proj\?"),
        ("qwen3_moe", {"target_modules": ["gate_proj"]}, "one matrix with up_proj. Name both"),
        ("gpt_oss", {"target_modules": ["experts"]}, "nothing to adapt .*adapters on experts of this architecture"),
        ("nemotron_h", {"target_modules": ["out_proj"]}, "nothing to adapt .*its layer reads the weight itself"),
        ("llama4", {"target_modules": ["router"]}, "nothing to adapt .*modules_to_save trains it whole"),
        ("mixtral", {"exclude_modules": ["self_atn"]}, r"exclude_modules=self_atn: .* Did you mean self_attn\?"),
        ("mixtral", {"modules_to_save": ["lm_heat"]}, r"modules_to_save=lm_heat: .* Did you mean lm_head\?"),
        ("mixtral", {"layers_to_transform": [0, 2]}, "layers_to_transform=2: the model's layers are numbered 0 to 1"),
        ("gpt_oss", {"exclude_modules": ["layers"]}, "nothing to adapt"),
    ],
)
def test_options_that_fit_no_layer(name, options, message):
    with pytest.raises(ModelError, match=message):
        Lora(**options).check(layers_of(make(name)))


@pytest.mark.parametrize(
    "name, options, adapted, whole",
    [
        ("gpt_oss", {"layers_to_transform": [1], "exclude_modules": ["k_proj"]}, {"1.self_attn": "qvo"}, ()),
        ("glm4_moe", {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}, {"0.self_attn": "q"}, ("mlp.gate",)),
        ("qwen3_moe", {"exclude_modules": ["experts"], "layers_to_transform": [0]}, {"0.self_attn": "qkvo"}, ()),
    ],
)
def test_options_choose_layers(name, options, adapted, whole):
    model = make(name)
    model = Lora(rank=4, **options).adapt(model, layers_of(model))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    [[place, letters]] = adapted.items()
    in_place = {re.search(r"(\w)_proj", name)[1] for name in names if f"layers.{place}." in name}
    assert in_place == set(letters)
    assert not any(f"layers.{1 - int(place[0])}." in name for name in names if "lora" in name) or name == "glm4_moe"
    assert {short(name.partition(".modules_to_save")[0]) for name in names if "lora" not in name} == set(whole)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_an_adapter_reloads_and_merges(name, tmp_path):
    """With plain peft, new tokens and a whole router with a buffer included."""
    import peft

    make(name).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    whole = ["gate"] if name == "deepseek_v3" else None
    adapted = Lora(rank=4, modules_to_save=whole).adapt(base, layers_of(base), new_token_ids=[100, 101])
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[3, 7, 100, 101, 9, 30]])
    with torch.no_grad():
        truth = adapted.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, truth)
        torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, truth, rtol=1e-4, atol=1e-5)


def test_kinds_by_name():
    shapes = {
        "transformer.wte.weight": (9, 4),
        "transformer.h.0.ln_1.weight": (4,),
        "transformer.h.0.attn.c_attn.weight": (4, 12),
        "transformer.h.0.mlp.c_fc.bias": (16,),
        "model.layers.0.mixer.in_proj.weight": (8, 4),
        "model.layers.0.mixer.q_proj.weight": (4, 4),
        "model.layers.0.mlp.experts.0.w1.weight": (8, 4),
        "model.layers.0.mlp.experts.1.w1.weight": (8, 4),
        "model.layers.0.mlp.gate.weight": (2, 4),
        "model.layers.0.mlp.shared_expert_gate.weight": (1, 4),
        "lm_head.weight": (9, 4),
    }
    found = list(kinds_of(shapes).values())
    assert found == [
        *("embeddings", "norms", "attention", "MLP", "other", "attention"),
        *("experts", "experts", "router", "MLP", "head"),
    ]
