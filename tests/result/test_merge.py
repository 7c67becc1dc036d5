"""A merged folder is base + adapter, tensor by tensor and expert by expert, or it is refused."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ft_dist.config.load import dump_config, validate
from ft_dist.errors import ModelError
from ft_dist.model.builtin import resolve_model
from ft_dist.model.quiet import quietly
from ft_dist.model.tokenizer import load_tokenizer
from ft_dist.result.export import export_run
from ft_dist.result.load import find_weights, load_finished, load_weights
from ft_dist.result.merge import compare_merged, merge
from tests.conftest import ROOT
from tests.families.architectures import make

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted_run(folder: Path, base: Path, **lora) -> Path:
    """A run folder as after training, with a random adapter."""
    run = folder / "run"
    tree = {
        "model": {"path": str(base), "dtype": "bf16"},
        "data": {"train": [str(ROOT / "configs/emails/test.jsonl")]},
        "output_dir": str(run),
    }
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(validate(tree)))
    with quietly():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8} | lora
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(run / "final")
    load_tokenizer(str(base))[0].save_pretrained(run / "final")
    return run


@pytest.fixture
def loaded(tmp_path):
    """(adapted, merged) models of a run with adapters on linears and on experts."""
    base = make("deepseek_v3", tmp_path / "base", dtype=torch.bfloat16)
    run = adapted_run(tmp_path, base, target_parameters=EXPERTS)
    weights = find_weights(str(run))
    options = {"dtype": torch.bfloat16, "vocabulary": 260}
    return load_weights(weights, **options), merge(weights, vocabulary=260)


def test_experts_and_the_routers_bias(tmp_path):
    base = make("deepseek_v3", tmp_path / "base", dtype=torch.bfloat16)
    lines: list[str] = []
    run = adapted_run(tmp_path, base, target_parameters=EXPERTS)
    export_run(run, kind="merged", to=tmp_path / "merged", progress=lines.append)
    # 10 matrices of attention, the router, and gate_up_proj and down_proj of all experts
    assert lines[-1].startswith("checked: 13 tensors are base + update, rounded once to bfloat16, 18 are the base's; ")
    with (
        safe_open(base / "model.safetensors", framework="pt") as before,
        safe_open(tmp_path / "merged/model.safetensors", framework="pt") as after,
    ):
        (name,) = [key for key in before.keys() if key.endswith("correction_bias")]  # noqa: SIM118
        assert after.get_tensor(name).dtype == torch.float32
        assert torch.equal(after.get_tensor(name), before.get_tensor(name))
        assert set(after.keys()) == set(before.keys())


@pytest.mark.parametrize("name", ["mlp.experts.down_proj", "o_proj.weight", "e_score_correction_bias", "norm.weight"])
def test_a_wrong_tensor_is_refused(loaded, name):
    adapted, merged = loaded
    assert compare_merged(adapted, merged, Path("merged")) == (13, 18)
    tensors = dict(merged.named_parameters()) | dict(merged.named_buffers())
    wrong = next(tensor for key, tensor in tensors.items() if key.endswith(name))
    wrong.data.view(-1)[-1] *= 1.02  # two or three units in the last place of bf16
    with pytest.raises(ModelError, match=rf"{name}.* (is not base \+ update|has no update, but differs)"):
        compare_merged(adapted, merged, Path("merged"))


def test_an_update_added_in_bf16_is_refused(loaded):
    """What peft does with a bf16 model: the update is rounded, and then the sum again."""
    adapted, merged = loaded
    layer = adapted.base_model.model.model.layers[0].self_attn.o_proj
    update = (2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).bfloat16()
    merged.model.layers[0].self_attn.o_proj.weight.data = layer.base_layer.weight.data + update
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.o_proj\.weight is not base \+ update"):
        compare_merged(adapted, merged, Path("merged"))


def test_fp32_keeps_the_update_of_a_bf16_run(tmp_path):
    run = adapted_run(tmp_path, Path(resolve_model("tiny-llama")))
    lines: list[str] = []
    export_run(run, kind="merged", to=tmp_path / "merged", dtype="fp32", progress=lines.append)
    assert "14 tensors are base + update, 7 are" in lines[-1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32
    with pytest.raises(ModelError, match="Remove --dtype"):
        export_run(run, kind="adapter", to=tmp_path / "adapter", dtype="fp32")


def test_generation_options_that_transformers_refuses_are_dropped(tmp_path):
    base = make("glm4_moe", tmp_path / "base")
    options = {"do_sample": False, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 64, "eos_token_id": 259}
    (base / "generation_config.json").write_text(json.dumps(options))
    lines: list[str] = []
    export_run(adapted_run(tmp_path, base), kind="merged", to=tmp_path / "merged", progress=lines.append)
    assert lines[0].startswith("generation_config.json: temperature=0.6, top_p=0.95 dropped")
    written = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert written["max_new_tokens"] == 64
    assert not {"temperature", "top_p"} & written.keys()


def test_an_adapter_that_peft_would_load_in_part_is_refused(tmp_path):
    """transformers renames Laguna's shared experts, and peft passes over what it then does not find."""
    run = adapted_run(tmp_path, make("laguna", tmp_path / "base", dtype=torch.bfloat16))
    lost = r"would not load base_model\S+layers\.1\.mlp\.shared_experts\.down_proj\.lora_A\.weight and 5 more"
    with pytest.raises(ModelError, match=lost):
        export_run(run, kind="merged", to=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ModelError, match=lost):
        load_finished(str(run))


def test_an_adapter_of_another_base_is_refused(tmp_path):
    run = adapted_run(tmp_path, Path(resolve_model("tiny-llama")))
    file = run / "final/adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_A.weight"
    save_file(tensors | {name.format(7): 2 * tensors[name.format(1)]}, file)
    with pytest.raises(ModelError, match=rf"would not load {name.format(7)} on .*Name the base that the adapter was"):
        load_finished(str(run))
