"""LoRA on an FP8 base through the command line: DeepSpeed in bf16 on two ranks, stopped and resumed, loaded by peft."""

import json

import torch
from torch import nn

from ft_dist.model.builtin import resolve_model
from ft_dist.result.load import load_finished
from tests.conftest import SMALL_RUN, read_lines

ARGUMENTS = [
    *(argument for argument in SMALL_RUN if "dtype" not in argument and "interval" not in argument),
    "model.dtype=bf16",
    "model.base_dtype=fp8",
    "method.dropout=0.1",
    "optim.schedule=constant",
    "engine.zero_stage=2",
]


def losses(folder):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_lines(folder / "metrics.jsonl")]


def train(cli, folder, steps, *more):
    return cli("train", *ARGUMENTS, f"optim.max_steps={steps}", f"output_dir={folder}", "--nproc", "2", *more)


def test_train_resume_and_load(cli, tmp_path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = train(cli, whole, 6)
    assert done.returncode == 0, done.stderr
    assert "base weights in fp8: 14 linears; emulated" in done.stdout
    assert train(cli, parted, 3).returncode == 0
    resumed = train(cli, parted, 6)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step 3" in resumed.stdout
    assert losses(parted) == losses(whole)

    # the result is the adapter, on the model's own weights
    config = json.loads((whole / "final" / "adapter_config.json").read_text())
    assert "base_dtype" not in config
    finished = load_finished(str(whole), device="cpu")
    layer = finished.model.get_base_model().model.layers[0].mlp.down_proj
    assert type(layer.get_base_layer()) is nn.Linear
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(resolve_model(finished.config.model.path), dtype=torch.bfloat16)
    assert torch.equal(layer.get_base_layer().weight, own.model.layers[0].mlp.down_proj.weight)
    assert layer.lora_B["default"].weight.any()
