"""The self-check catches what would train silently on something wrong, and names the part."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ft_dist.model.tiny import make_tiny
from tests.conftest import ROOT, read_lines
from tests.families.architectures import make
from tests.ports import free_port

PLANTED = Path(__file__).with_name("planted.py")
SETTINGS = ["smoke", "model.dtype=fp32", "data.eval=[]", "optim.max_steps=1", "checkpoint.interval_steps=0"]


def run_with(
    fault: str, folder: Path, *settings: str, world: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    # the cache of an earlier, faultless run must not answer
    place = {"PYTHONPATH": paths, "FT_DIST_CACHE": str(folder / "cache")}
    if not (folder / "model").exists():
        make_tiny("tiny-llama", folder / "model")
    command = [sys.executable, str(PLANTED), fault, *SETTINGS, f"model.path={folder / 'model'}"]
    command += [f"output_dir={folder / 'run'}", *settings]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | place | (world or {}), capture_output=True, text=True, timeout=300
    )


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    return next(line for line in done.stderr.splitlines() if line.startswith("ft-dist: error"))


@pytest.mark.parametrize(
    "fault, named",
    [
        ("leaking_mask", "data.packing=true, but samples in one row change each other's loss"),
        ("halved_logits", "transformers' own forward of the same tokens"),
        ("wrong_norm", "transformers' own forward of the same tokens"),
        ("frozen_adapter", "q_proj.lora_B.default.weight: frozen, although method.kind=lora trains it"),
        ("unread_adapter", "no gradient reaches"),
        ("counting_buffer", "training changes base_model.model.model.norm.seen, which no optimizer updates"),
    ],
)
def test_a_planted_fault_ends_the_run_before_its_first_step(fault: str, named: str, tmp_path: Path) -> None:
    done = run_with(fault, tmp_path, "data.packing=true")
    assert done.returncode == 2, done.stderr
    assert named in error_of(done)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_leak_gives_each_sample_a_row_unless_packing_is_set(tmp_path: Path) -> None:
    done = run_with("leaking_mask", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "each sample gets its own row" in done.stderr + done.stdout


def broken(folder: Path, change: Any) -> Path:
    make_tiny("tiny-llama", folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda w: {name: tensor for name, tensor in w.items() if ".layers.1." not in name},
            "no weights for model.layers.1.input_layernorm.weight",
        ),
        (lambda w: {f"other.{name}": tensor for name, tensor in w.items()}, "which no layer reads"),
        (
            lambda w: w | {"model.norm.weight": w["model.norm.weight"][:-1].contiguous()},
            "model.norm.weight has shape [63], but config.json makes it [64]",
        ),
        (
            lambda w: w | {"model.layers.0.self_attn.o_proj.bias": w["model.norm.weight"].clone()},
            "no layer reads model.layers.0.self_attn.o_proj.bias",
        ),
    ],
    ids=["missing layer", "foreign names", "other shape", "unread bias"],
)
def test_a_weight_that_is_not_read_or_not_there_is_refused(cli: Any, change: Any, named: str, tmp_path: Path) -> None:
    folder = broken(tmp_path / "model", change)
    errors = []
    for verb in ("check", "train"):
        done = cli(verb, *SETTINGS, f"model.path={folder}", f"output_dir={tmp_path / 'run'}")
        assert done.returncode == 2, done.stderr
        errors.append(error_of(done))
    assert named in errors[0]
    assert errors[0] == errors[1]


def test_a_part_that_text_models_do_not_have_is_reported(cli: Any, tmp_path: Path) -> None:
    extra = {"mtp.layers.0.norm.weight", "model.visual.blocks.0.norm.weight"}
    folder = broken(tmp_path / "model", lambda w: w | {name: w["model.norm.weight"].clone() for name in extra})
    done = cli("check", *SETTINGS, f"model.path={folder}", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "model: model.visual, mtp (2 tensors) are left out of training and of final/" in done.stdout


def long_rope(folder: Path) -> Path:
    """A tiny Phi-3 of 256 positions, stretched to 512."""
    make("phi3", folder)
    config = json.loads((folder / "config.json").read_text())
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    config |= {"max_position_embeddings": 512, "original_max_position_embeddings": 256}
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "original_max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_longrope_keeps_samples_apart(cli: Any, tmp_path: Path) -> None:
    """transformers picks one set of frequencies for a whole forward, by its longest sample."""
    model = long_rope(tmp_path / "model")
    common = ("train", *SETTINGS, f"model.path={model}", "--nproc", "1", f"output_dir={tmp_path / 'run'}")
    for settings, named in (
        (
            ["data.packing=true"],
            "data.packing=true, but with data.max_length=512, rotary angles depend on the longest sample",
        ),
        (
            ["batch.micro_rows=2"],
            "batch.micro_rows=2, but with data.max_length=512, rotary angles depend on the longest sample",
        ),
    ):
        done = cli(*common, *settings)
        assert done.returncode == 2, done.stderr
        assert named in error_of(done)
    done = cli(*common, "batch.micro_rows=1")
    assert done.returncode == 0, done.stderr
    assert "(LongRoPE); each sample gets its own row" in done.stdout
    done = cli(*common[:-1], f"output_dir={tmp_path / 'short'}", "data.max_length=256")
    assert done.returncode == 0, done.stderr
    assert "its own row" not in done.stdout


def test_longrope_is_scored_one_sample_at_a_time(cli: Any, tmp_path: Path) -> None:
    model = long_rope(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    texts = ["short answer, well below the original positions", "long " * 80]
    data.write_text("".join(json.dumps({"prompt": "Say:", "completion": text}) + "\n" for text in texts))
    losses = []
    for rows in (1, 16):
        run = tmp_path / f"rows{rows}"
        settings = [f"evaluate.batch_rows={rows}", f"data.eval={data}", "evaluate.generate=false"]
        done = cli("train", *SETTINGS, *settings, f"model.path={model}", f"output_dir={run}", "--nproc", "1")
        assert done.returncode == 0, done.stderr
        losses.append(json.loads((run / "summary.json").read_text())["before"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_loss_that_training_leaves_out_is_reported(cli: Any, tmp_path: Path) -> None:
    make("mixtral", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"output_router_logits": True}))
    done = cli("train", *SETTINGS, f"model.path={tmp_path / 'model'}", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "such as an auxiliary loss of routers; training leaves it out" in done.stdout


@pytest.mark.parametrize("stage, ranks", [(0, 1), (2, 2), (3, 2)])
def test_it_changes_no_step(cli: Any, stage: int, ranks: int, tmp_path: Path) -> None:
    """The first run measures, the second finds the result in the cache."""
    metrics = []
    for number in range(2):
        run = tmp_path / str(number)
        settings = [*SETTINGS, "optim.max_steps=3", f"engine.zero_stage={stage}", f"output_dir={run}"]
        done = cli("train", *settings, "--nproc", str(ranks), FT_DIST_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        assert ("self-check (cached)" if number else "self-check: loss") in done.stdout + done.stderr
        lines = read_lines(run / "metrics.jsonl")
        metrics.append([(line["loss"], line["grad_norm"]) for line in lines])
    assert metrics[0] == metrics[1]


def token_file(folder: Path) -> Path:
    path = folder / "tokens.jsonl"
    rows = [{"tokens": [5 + (7 * at * row) % 240 for at in range(12 + row)]} for row in range(1, 9)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_it_takes_tokens_as_training_does(cli: Any, tmp_path: Path) -> None:
    """A file of tokens, the same file live, and a prepared set."""
    tokens, place = token_file(tmp_path), f"output_dir={tmp_path / 'run'}"
    cache = {"FT_DIST_CACHE": str(tmp_path / "cache")}
    live = f"data.train=[{{path: {tokens}, format: tokens, live: true}}]"
    done = cli("train", *SETTINGS, live, place, "--nproc", "1", **cache)
    assert done.returncode == 0, done.stderr
    assert "self-check: loss" in done.stdout
    assert cli("prepare", *SETTINGS, place, "--to", str(tmp_path / "set"), **cache).returncode == 0
    for number, data in enumerate([f"[{{path: {tokens}, format: tokens}}]", tmp_path / "set/train-0"]):
        cache = {"FT_DIST_CACHE": str(tmp_path / f"cache-{number}")}
        done = cli("check", "--model", *SETTINGS, f"data.train={data}", f"output_dir={tmp_path / 'new'}", **cache)
        assert done.returncode == 0, done.stderr
        assert "self-check: loss" in done.stdout
        assert done.stdout.splitlines()[-1] == "ready to train"


def test_data_that_cannot_be_read_are_not_the_architectures_fault(cli: Any, tmp_path: Path) -> None:
    """The first 64 records have no usable sample, so the self-check reads on, to a token that is none."""
    lines = [{"tokens": [5]}] * 70 + [{"tokens": [5, 6, 9999]}]
    path = tmp_path / "tokens.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    source = f"data.train=[{{path: {path}, format: tokens, live: true}}]"
    cache = {"FT_DIST_CACHE": str(tmp_path / "cache")}  # a cached result needs no data
    done = cli("check", "--model", *SETTINGS, source, f"output_dir={tmp_path / 'run'}", **cache)
    assert done.returncode == 2
    assert "token 9999, but the tokenizer has only" in error_of(done)


def test_a_result_holds_for_these_weights_only(cli: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_tiny("tiny-llama", model)
    good = load_file(model / "model.safetensors")
    bad = good | {"model.norm.weight": torch.full_like(good["model.norm.weight"], torch.nan)}
    cache = {"FT_DIST_CACHE": str(tmp_path / "cache")}
    for number, (weights, code, said) in enumerate(
        [(bad, 2, "that are not finite"), (good, 0, "self-check: loss"), (bad, 2, "that are not finite")]
    ):
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        run = f"output_dir={tmp_path / str(number)}"
        done = cli("check", "--model", *SETTINGS, f"model.path={model}", run, **cache)
        assert done.returncode == code, done.stdout + done.stderr
        assert said in done.stdout + done.stderr
    refused = cli("check", "--model", *SETTINGS, f"model.path={model}", f"output_dir={tmp_path / '3'}", **cache)
    assert refused.returncode == 2


def test_attention_that_is_resolved_otherwise_is_measured_again(tmp_path: Path) -> None:
    """Neither config.json nor model.attention=auto says what transformers chose."""
    runs = [("nothing", "self-check: loss"), ("nothing", "self-check (cached)"), ("eager", "self-check: loss")]
    for number, (fault, said) in enumerate(runs):
        done = run_with(fault, tmp_path, f"output_dir={tmp_path / str(number)}")
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


@pytest.mark.parametrize(
    "fault, said",
    [
        ("no_memory", "out of memory at batch.micro_rows="),
        ("no_shared_memory", "Set model.kernels=off and report this"),
    ],
)
def test_what_ends_rank_0_alone_ends_both_in_one_line(fault: str, said: str, tmp_path: Path) -> None:
    make_tiny("tiny-llama", tmp_path / "model")
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(run_with, fault, tmp_path, world=world | {"RANK": str(rank)}) for rank in range(2)]
    for done in (job.result() for job in jobs):
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    assert said in error_of(jobs[0].result())


def test_an_estimate_of_steps_follows_what_the_self_check_decided(tmp_path: Path) -> None:
    done = run_with("leaking_mask", tmp_path, "optim.max_steps=null", "batch.global_rows=240")
    assert done.returncode == 0, done.stderr
    # of 480 samples
    assert "about 2 steps; for this many" in done.stdout
    assert "for 2 steps on" in done.stdout
    assert json.loads((tmp_path / "run/report.json").read_text())["estimated_steps"] == 2
