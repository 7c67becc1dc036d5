"""Folders whose tensors do not make up the model are refused in one line; old checkpoints with buffers are not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ft_dist.config.schema import ModelConfig
from ft_dist.errors import ModelError
from ft_dist.model.anatomy.weights import is_of_folder
from ft_dist.model.load import load_model
from tests.families.architectures import make

NAMED = "the tensors in the folder do not make up model.layers.0.mlp.experts.gate_up_proj"
EXPERT = "model.layers.0.block_sparse_moe.experts.2.w1.weight"


def changed(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder, **options):
    return load_model(ModelConfig(path=str(folder), dtype="fp32"), folder=str(folder), vocabulary=1, **options)


def shorten(weights):
    weights[EXPERT] = weights[EXPERT][:-1].contiguous()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda weights: weights.pop(EXPERT), "Sizes of tensors must match"),
        (
            shorten,
            "stack expects each tensor to be equal size, but got",
        ),
    ],
    ids=["missing", "a row short"],
)
@pytest.mark.parametrize("meta", [True, False])
def test_an_expert_that_is_missing_or_cut_is_refused(change, reason, meta, tmp_path):
    changed(make("mixtral", tmp_path), change)
    with pytest.raises(ModelError, match=f"transformers cannot load it .{NAMED}: {reason}") as error:
        load(tmp_path, meta=meta)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"num_attention_heads": 0}, "ZeroDivisionError: "),
        ({"hidden_act": "foo"}, "KeyError: 'foo'"),
        ({"num_hidden_layers": "2"}, "Field 'num_hidden_layers' expected int, got str"),
        ({"vocab_size": 0}, "Padding_idx must be within num_embeddings"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(settings, reason, tmp_path):
    file = make("llama", tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ModelError, match=f"transformers cannot load it .*{reason}"):
        load(tmp_path)


def test_errors_of_memory_and_of_other_ranks_are_not_the_folders():
    def raised(error):
        try:
            raise error
        except Exception as caught:
            return caught

    closed = raised(RuntimeError("Connection closed by peer"))
    assert not is_of_folder(closed, alone=False)
    assert is_of_folder(closed, alone=True)
    assert is_of_folder(raised(KeyError("weight_map")), alone=False)
    assert not is_of_folder(raised(RuntimeError("DefaultCPUAllocator: can't allocate memory")), alone=True)


MASK = torch.ones(1, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    "model_type, buffers",
    [
        ("gpt_neo", {"transformer.h.0.attn.attention.bias": MASK, "transformer.h.0.attn.attention.masked_bias": MASK}),
        ("gptj", {"transformer.h.0.attn.bias": MASK, "transformer.h.0.attn.masked_bias": MASK}),
        ("codegen", {"transformer.h.0.attn.causal_mask": MASK}),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        ("xglm", {"model.embed_positions.weights": torch.ones(8, 64)}),
    ],
)
def test_buffers_of_old_checkpoints_are_computed(model_type, buffers, tmp_path):
    changed(
        make(model_type, tmp_path),
        lambda weights: weights.update({name: value.clone() for name, value in buffers.items()}),
    )
    assert load(tmp_path).notes == []


@pytest.mark.parametrize("name", ["self_attn.o_proj.bias", "mlp.attention.bias"])
def test_a_bias_that_no_layer_reads_is_refused(name, tmp_path):
    def add(weights):
        weights[f"model.layers.0.{name}"] = torch.ones(64)
        if name.startswith("mlp"):
            weights["model.layers.0.mlp.attention.weight"] = torch.ones(64, 64)

    changed(make("llama", tmp_path), add)
    with pytest.raises(ModelError, match=f"no layer reads model.layers.0.{name}"):
        load(tmp_path)
