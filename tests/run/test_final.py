"""`final/` holds every parameter and persistent buffer of the trained model, and transformers computes the same."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from ft_dist.model.tiny import make_tiny
from tests.conftest import ROOT, read_lines
from tests.families.architectures import make
from tests.families.multimodal import make_multimodal
from tests.run.test_self_check import run_with

WITH_BUFFERS = ["deepseek_v3", "glm4_moe", "minimax_m2", "lfm2_moe", "gemma4_text", "nemotron_h"]
BUFFERS = ("e_score_correction_bias", "expert_bias", "layer_scalar")
QUICK = ["checkpoint.interval_steps=0", "evaluate.before=false", "optim.max_steps=2", "optim.lr=0.01"]


def buffers(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.endswith(BUFFERS)}  # noqa: SIM118


def summary(run):
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_real_architectures_in_bf16(tmp_path, method):
    folders = [make(name, tmp_path / name, dtype=torch.bfloat16) for name in WITH_BUFFERS]
    command = [sys.executable, "-m", "tests.run.final_of", method, "bf16", *map(str, folders)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [each["folder"] for each in found] == WITH_BUFFERS
    for each, folder in zip(found, folders, strict=True):
        assert (each["reloaded"], each["agrees"], each["samples"], each["notes"]) == (True, True, 8, []), each
        if method == "full":
            kept, base = buffers(folder.with_name(f"{folder.name}-run") / "final"), buffers(folder)
            assert kept.keys() == base.keys() != set()
            # transformers loads some in the model's dtype
            assert all(torch.equal(kept[name], base[name].to(kept[name].dtype)) for name in base)
            own = {"minimax_m2", "gemma4_text"}
            assert all((kept[name].dtype == torch.float32) == (folder.name not in own) for name in base), folder


def test_zero_3_saves_buffers_and_the_run_says_what_it_checked(cli, tmp_path):
    model, run = make("gemma4_text", tmp_path / "model"), tmp_path / "run"
    options = [f"model.path={model}", f"output_dir={run}", "model.dtype=fp32", "method.kind=full"]
    done = cli("train", "smoke", *options, *QUICK, "engine.zero_stage=3", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert "final/: 39 tensors read back, equal to the trained ones; loaded again, loss " in done.stdout
    kept, base = buffers(run / "final"), buffers(model)
    assert all(torch.equal(kept[name], base[name]) for name in base)
    checked = summary(run)["final_check"]
    assert (checked["tensors"], checked["samples"], checked["agrees"]) == (39, 8, True)
    assert checked["reloaded_loss"] == pytest.approx(checked["loss"], rel=1e-4)
    done = cli("eval", str(run), "--max-samples", "16", "--max-new-tokens", "1", "--json")
    assert json.loads(done.stdout)["loss"] == pytest.approx(summary(run)["after"]["loss"], rel=1e-4)


def test_eval_of_an_adapter_trained_in_fp32_on_a_bf16_base(cli, tmp_path):
    """Under ZeRO-3 adapters stay in fp32; `eval` once rounded them to bf16."""
    run = tmp_path / "run"
    options = [f"output_dir={run}", "engine.zero_stage=3", "optim.lr=0.1", "optim.max_steps=8", *QUICK[:2]]
    assert cli("train", "smoke", *options).returncode == 0
    with safe_open(run / "final/adapter_model.safetensors", framework="pt") as file:
        assert all(file.get_tensor(name).dtype == torch.float32 for name in file.keys())  # noqa: SIM118
    from ft_dist.result.load import load_finished

    adapted = load_finished(str(run), device="cpu").model
    dtypes = {name.split(".")[-2]: p.dtype for name, p in adapted.named_parameters()}
    assert (dtypes["default"], dtypes["base_layer"]) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_a_multimodal_model_is_trained_as_text_and_says_so(cli, tmp_path, name):
    model, run = make_multimodal(name, tmp_path / "model"), tmp_path / "run"
    options = [f"model.path={model}", f"output_dir={run}", "model.dtype=fp32", "method.kind=full"]
    part = {"qwen3_5": "visual", "gemma3": "vision_tower"}[name]
    checked = cli("check", "smoke", *options, "--nproc", "1")
    assert "only the text model is trained, not" in checked.stdout
    assert part in checked.stdout
    done = cli("train", "smoke", *options, *QUICK, "optim.weight_decay=0.5", "--nproc", "1")
    assert done.returncode == 0, done.stderr
    final = {"qwen3_5": "leaves out: visual (Qwen3_5ForCausalLM", "gemma3": "keeps unchanged: multi_modal_projector"}
    assert f"final/ {final[name]}" in done.stdout
    assert summary(run)["final_check"]["agrees"]
    with (
        safe_open(model / "model.safetensors", framework="pt") as base,
        safe_open(run / "final/model.safetensors", framework="pt") as trained,
    ):
        vision = [key for key in base.keys() if part in key]  # noqa: SIM118
        assert {key in trained.keys() for key in vision} == {name == "gemma3"}  # noqa: SIM118
        if name == "gemma3":
            assert all(torch.equal(base.get_tensor(key), trained.get_tensor(key)) for key in vision)


def test_an_adapter_has_no_generation_config_to_mend(cli, tmp_path):
    make_tiny("tiny-llama", tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    for method, mends in (("lora", False), ("full", True)):
        run = tmp_path / method
        options = [f"model.path={tmp_path / 'model'}", f"output_dir={run}", f"method.kind={method}", "data.eval=[]"]
        done = cli("train", "smoke", *options, *QUICK, "--nproc", "1")
        assert done.returncode == 0, done.stderr
        assert ("generation_config.json: temperature=0.6 dropped" in done.stdout) == mends
        assert (run / "final/generation_config.json").exists() == mends


def test_a_loss_that_is_not_finite_is_not_blamed_on_the_base(cli, tmp_path):
    options = [
        f"output_dir={tmp_path / 'run'}",
        "data.eval=[]",
        "optim.lr=1e30",
        "optim.warmup_steps=0",
        "--nproc",
        "1",
    ]
    done = cli("train", "smoke", *options, *QUICK[:2], "optim.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run")["final_check"]["loss"] is None
    assert "note: the loss of the trained model is not finite on 8 samples. final/ holds it as it is" in done.stdout
    assert "base model" not in done.stdout


def test_memory_is_counted_once_the_weights_are_gathered(tmp_path):
    """The copy that rank 0 writes is in memory while the model is loaded again."""
    done = run_with("full_memory_during_the_write", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not loaded again: no memory is left" in done.stdout


@pytest.fixture
def mount(tmp_path):
    """Mount a file system of so many KiB at a new folder."""
    mounted = []

    def at(place, size):
        place.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
        if subprocess.run(command, check=False).returncode:
            pytest.skip("mounting needs root")
        mounted.append(place)
        return place

    yield at
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=False)


def refused(done, run, reason):
    """The run ended in one line that says what is safe, and left nothing unfinished."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert f"{run / 'final'}: cannot be written (" in line
    assert reason in line
    assert "The commit of step 2 is safe: fix the cause and run the same command again" in line
    assert not [path for path in run.iterdir() if path.name.startswith(".final")]


def test_a_full_disk_ends_the_run_in_one_line_and_the_next_start_writes_the_result(cli, mount, tmp_path):
    disk = mount(tmp_path / "disk", 1750)  # the commit of a full run takes 1450
    run = disk / "run"
    options = ["smoke", "method.kind=full", "model.dtype=fp32", f"output_dir={run}", *QUICK, "--nproc", "1"]
    refused(cli("train", *options), run, "No space left on device")
    assert not (run / "final").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    again = cli("train", *options)
    assert again.returncode == 0, again.stderr
    assert "resumed from step 2" in again.stdout
    assert summary(run)["final_check"]["agrees"]
    assert [event["event"] for event in read_lines(run / "events.jsonl")].count("end") == 1


def test_no_rank_waits_for_one_that_could_not_write(cli, mount, tmp_path):
    run = tmp_path / "run"
    mount(run / "final", 4)  # a mount point cannot be replaced
    done = cli("train", "smoke", f"output_dir={run}", *QUICK, "--nproc", "2", timeout_s=120)
    refused(done, run, "Device or resource busy")
