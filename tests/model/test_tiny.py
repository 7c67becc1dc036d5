"""The tiny models load with plain transformers, have the same bits every time, and give their facts without torch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_dist.errors import ModelError
from ft_dist.method.lora import match_target_modules
from ft_dist.model.facts import model_facts
from ft_dist.model.shape import model_shape
from ft_dist.model.tiny import make_tiny, tiny_names


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    for name in tiny_names():
        (root / name).mkdir()
        make_tiny(name, root / name)
    return {name: root / name for name in tiny_names()}


@pytest.mark.parametrize("name", tiny_names())
def test_loads_and_computes(tiny: dict[str, Path], name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny[name])
    model = AutoModelForCausalLM.from_pretrained(tiny[name])
    assert name.removeprefix("tiny-").replace("smollm", "llama") in model.config.model_type
    assert model.config.num_key_value_heads == 2
    text = "Größe: 5 µm 你好<|im_end|>\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert ids.max() < model.config.vocab_size == len(tokenizer)
    loss = model(ids, labels=ids).loss
    assert 4 < loss.item() < 8  # ln(260) = 5.6: random but not saturated
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_same_bits_every_time(tiny: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(123)
    make_tiny("tiny-qwen2", tmp_path)
    again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path, tiny["tiny-qwen2"]))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("name", tiny_names())
def test_facts_agree_with_the_loaded_model(tiny: dict[str, Path], name: str) -> None:
    facts = model_facts(tiny[name])
    model = AutoModelForCausalLM.from_pretrained(tiny[name])
    assert facts.total_parameters == model.num_parameters()
    assert (facts.dtype, facts.max_positions, facts.architecture) == ("fp32", 4096, type(model).__name__)


def linears(name: str) -> list[str]:
    return [p.name.removesuffix(".weight") for p in model_shape(name).parameters if p.linear]


def test_target_modules_match_as_peft_matches() -> None:
    names = linears("tiny-llama")
    assert match_target_modules(names, "all-linear") == names
    assert len(match_target_modules(names, ["q_proj", "self_attn.v_proj"])) == 4
    assert match_target_modules(names, ["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(ModelError, match=r"target_modules=q_prj: .* Did you mean q_proj\?"):
        match_target_modules(names, ["v_proj", "q_prj"])
    with pytest.raises(ModelError, match=r"gate_up_proj, o_proj, qkv_proj"):
        match_target_modules(linears("tiny-phi3"), ["q_proj"])


def test_damaged_folders_are_named(tiny: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        model_facts(tmp_path)
    (tmp_path / "config.json").write_text((tiny["tiny-llama"] / "config.json").read_text())
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        model_facts(tmp_path)
    whole = (tiny["tiny-llama"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=f"has {len(whole) - 1} of {len(whole)} bytes"):
        model_facts(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelError, match="not a safetensors file"):
        model_facts(tmp_path)
