"""Runs that train more than adapters: rows of new tokens, whole modules, parameters of experts; at every ZeRO stage."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ft_dist.model.tiny import byte_tokenizer
from ft_dist.result.export import export_run
from ft_dist.result.score import evaluate_path
from tests.conftest import read_lines
from tests.families.architectures import make as make_architecture
from tests.model.parts.families import SIZES, make

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<call> ok"}]


def arguments(folder: Path, data: Path, model: str, stage: int, nproc: int, *overrides: str) -> list[str]:
    settings = {
        "model.path": model,
        "model.dtype": "fp32",
        "model.new_tokens": "['<call>']",
        "data.train": data,
        "data.eval": data,
        "data.packing": "false",
        "optim.lr": "1e-2",
        "optim.schedule": "constant",
        "optim.epochs": 50,
        "optim.max_steps": 24,
        "checkpoint.interval_steps": 12,
        "engine.zero_stage": stage,
        "evaluate.max_new_tokens": 8,
        "evaluate.before": "false",
        "output_dir": folder,
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    return ["train", "smoke", *given, *overrides, "--nproc", str(nproc), "--max-restarts", "0"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "learn.jsonl"
    path.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(16)))
    return path


def test_a_new_token_is_learnt_said_and_exported(cli, data, tmp_path):
    """With a head of its own, over a resume at another stage on more ranks; a frozen row could never say the token."""
    run = tmp_path / "run"
    done = cli(*arguments(run, data, "tiny-llama", 0, 1, "optim.max_steps=12"))
    assert done.returncode == 0, done.stderr
    done = cli(*arguments(run, data, "tiny-llama", 3, 2, "evaluate.generate=true"))
    assert done.returncode == 0, done.stderr
    assert "resumed from step 12" in done.stdout
    assert "parameters train (attention 100%, MLP 100%, embeddings 0.3%, head 0.3%, norms 0%)" in done.stdout
    after = json.loads((run / "summary.json").read_text())["after"]
    assert after["accuracy"] == 1.0
    assert after["examples"][0]["answer"] == "<call> ok"
    export_run(run, kind="merged", to=tmp_path / "merged")
    for place in (run, tmp_path / "merged"):
        scores = evaluate_path(str(place), [str(data)], max_new_tokens=8)
        assert scores.accuracy == 1.0
        assert scores.loss == pytest.approx(after["loss"], rel=1e-4)


def test_stages_agree_on_whole_modules_and_experts(cli, data, tmp_path):
    """Under ZeRO-3 too, which gathers the parameters that peft moves during a forward."""
    model = tmp_path / "model"
    make("glm4_moe").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    losses = []
    for stage, nproc in ((0, 1), (3, 2)):
        run = tmp_path / f"stage{stage}"
        whole = "method.modules_to_save=[gate,lm_head,norm]"
        done = cli(*arguments(run, data, str(model), stage, nproc, whole, "optim.max_steps=4", "optim.lr=1e-3"))
        assert done.returncode == 0, done.stderr
        assert "MLP 100%, experts 100%, router 100%, embeddings 0.3%, head 100%" in done.stdout
        after = json.loads((run / "summary.json").read_text())["after"]
        losses.append([*(line["loss"] for line in read_lines(run / "metrics.jsonl")), after["loss"]])
        assert evaluate_path(str(run), [str(data)], max_new_tokens=1).loss == pytest.approx(after["loss"], rel=1e-4)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 3])
def test_adapters_that_would_not_load_are_refused_at_every_stage(cli, data, tmp_path, stage):
    """peft saves the adapters of Laguna's shared experts, and passes over them when it loads."""
    model, run = make_architecture("laguna", tmp_path / "model"), tmp_path / "run"
    done = cli(*arguments(run, data, str(model), stage, 1))
    assert done.returncode == 2, done.stdout
    assert "peft would not load the adapters of mlp.shared_experts.down_proj" in done.stderr
    assert "Set method.exclude_modules=mlp.shared_experts.down_proj,mlp.shared_experts.gate_proj" in done.stderr
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_stages_agree_on_dora(cli, data, tmp_path, kernels):
    """DoRA reads norms of weights that ZeRO-3 has partitioned: at the start and, without kernels, in every forward."""
    model = tmp_path / "model"
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"hidden_size": 384})  # 147k values: DeepSpeed leaves smaller matrices whole
    LlamaForCausalLM(config).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    losses = []
    for stage, nproc in ((0, 1), (3, 2)):
        run = tmp_path / f"stage{stage}"
        settings = ["method.dora=true", f"model.kernels={kernels}", "optim.max_steps=4", "optim.lr=1e-3"]
        done = cli(*arguments(run, data, str(model), stage, nproc, *settings))
        assert done.returncode == 0, done.stderr
        after = json.loads((run / "summary.json").read_text())["after"]
        losses.append([*(line["loss"] for line in read_lines(run / "metrics.jsonl")), after["loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
