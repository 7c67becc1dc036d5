"""`ft-dist plan` on models with only a config.json."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from ft_dist.config import load_config
from ft_dist.errors import ConfigError, ModelError, UserError
from ft_dist.method.lora import Lora
from ft_dist.model.builtin import builtin_names, resolve_model
from ft_dist.model.parts.layers import layers_of
from ft_dist.model.shape import model_shape, shape_of_config
from ft_dist.model.tiny import tiny_names
from ft_dist.plan.gpu import gpu_like, gpu_named, gpus
from ft_dist.plan.job import Job, job_of
from ft_dist.plan.memory.activations import Walk
from ft_dist.plan.memory.ledger import Ledger
from ft_dist.plan.memory.total import kept_by_block, memory_plan
from ft_dist.plan.report import Cluster, fitted, plan_run, table
from ft_dist.plan.speed import LAUNCH_S, update_s
from tests.plan.shapes import LLAMA_8B, LLAMA_70B, folder, shape


@pytest.mark.parametrize("name", tiny_names())
def test_parameters_equal_the_models(name):
    """By count and by shape, for every supported architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(resolve_model(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    planned = model_shape(name)
    assert sorted(parameter.shape for parameter in planned.parameters) == sorted(
        tuple(parameter.shape) for parameter in model.parameters()
    )


@pytest.mark.parametrize(
    "name, options",
    [
        ("tiny-llama", {"modules_to_save": ["lm_head", "input_layernorm"]}),
        ("tiny-llama", {"exclude_modules": ["mlp", "k_proj"], "layers_to_transform": [1]}),
        ("tiny-gemma2", {"modules_to_save": ["post_feedforward_layernorm", "model.norm"]}),
        ("tiny-smollm", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
        ("tiny-qwen3", {"modules_to_save": ["mlp"]}),
    ],
)
def test_what_lora_trains_is_counted(name, options):
    from transformers import AutoModelForCausalLM

    method = Lora(rank=4, **options)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(name))
    model = method.adapt(model, layers_of(model))
    planned = method.trained(model_shape(name))
    assert sorted(parameter.shape for parameter in planned) == sorted(
        tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad
    )


def test_a_head_that_trains_whole_takes_its_gradient():
    job = job_of(load_config("smoke", ["method.modules_to_save=[lm_head]"]), ranks=1, gpu=False)
    frozen = job_of(load_config("smoke"), ranks=1, gpu=False)
    head = job.shape.head.numel
    assert job.trains_head
    assert job.trainable == frozen.trainable + head
    # master values, moments and the gradient, in fp32
    assert memory_plan(job).tensors - memory_plan(frozen).tensors > 4 * 4 * head


def test_published_models_have_their_size():
    assert shape(LLAMA_8B).total_parameters == 8_030_261_248
    assert shape(LLAMA_70B).total_parameters == 70_553_706_496


def test_nothing_is_downloaded_or_created(tmp_path, monkeypatch):
    monkeypatch.setenv("FT_DIST_CACHE", str(tmp_path / "cache"))
    for name in builtin_names():
        assert model_shape(name).total_parameters > 0
    assert model_shape("smollm2-135m").total_parameters == 134_515_008
    assert not (tmp_path / "cache").exists()


def test_what_a_block_of_llama3_8b_keeps_on_a_gpu():
    """866.6 MiB of tensors are alive after forward in a simulated run at 2 x 4096, rank 16; checkpointing is unchanged.
    The extra columns for adapters next to the weights were counted by hand."""
    settings = ["model.dtype=bf16", "data.packing=false", "batch.micro_rows=2", "batch.global_rows=2"]
    config = load_config("smoke", [*settings, "data.max_length=4096", "method.rank=16"])
    job = Job(shape(LLAMA_8B), config, 1, 8, gpu=True)
    assert kept_by_block(job) / 2**20 == pytest.approx(866.6, rel=0.005)
    assert job.spare_columns == 32 * (48 * 6144 + 32 * 28672 + 16 * 4096)
    torch_kernels = replace(
        job, config=load_config("smoke", [*settings, "data.max_length=4096", "model.kernels=torch"])
    )
    assert kept_by_block(torch_kernels) - kept_by_block(job) == pytest.approx(8192 * 14336 * 2, rel=0.02)


def test_experts_and_unknown_models_are_reported():
    with pytest.raises(ModelError, match="128 experts"):
        shape_of_config(LLAMA_8B | {"num_experts": 128}, "m")
    with pytest.raises(ModelError, match="no hidden_size"):
        shape_of_config({"model_type": "mamba"}, "m")


def test_a_plan_of_70b_needs_neither_torch_nor_weights(cli, tmp_path):
    """It takes well under two seconds; this shows that nothing heavy is imported."""
    import subprocess
    import sys

    from tests.conftest import ROOT

    model = folder(LLAMA_70B, tmp_path / "model")
    arguments = ["plan", "llama3_8b_full_zero3", f"model.path={model}", "--gpu", "h200", "--nodes", "2", "--json"]
    code = (
        "import sys\nfrom ft_dist.cli.app import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "print('loaded', [name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, _, loaded = done.stdout.rpartition("loaded")
    assert loaded.strip() == "[]"
    tree = json.loads(text)
    assert tree["world"]["gpus"] == 16
    assert sum(tree["memory"]["parts_bytes"].values()) == tree["memory"]["peak_bytes"]
    assert sum(tree["step"]["parts"].values()) == pytest.approx(tree["step"]["seconds"])
    assert [path.name for path in model.iterdir()] == ["config.json"]


def plan_of(tmp_path, *overrides, recipe="llama3_8b_lora", **cluster):
    config = load_config(recipe, [f"model.path={folder(LLAMA_8B, tmp_path / 'model')}", *overrides])
    return plan_run(config, Cluster(**cluster))


def test_more_of_what_saves_memory_takes_less(tmp_path):
    def peak(*overrides):
        return plan_of(tmp_path, *overrides, recipe="llama3_8b_full_zero3")["memory"]["tensors_bytes"]

    stages = [peak(f"engine.zero_stage={stage}", "batch.micro_rows=2") for stage in (1, 2, 3)]
    assert stages == sorted(stages, reverse=True)
    assert peak("engine.offload=cpu") < peak()
    assert peak("optim.kind=adamw_8bit") < peak("optim.kind=muon") < peak()
    assert (
        peak()
        < peak("engine.activation_checkpointing=false")
        < peak("engine.activation_checkpointing=false", "model.kernels=off")
    )
    # attention on a GPU reads packed rows in place
    assert peak("data.packing=false", "engine.activation_checkpointing=false") == peak(
        "engine.activation_checkpointing=false"
    )


def test_an_fp8_base_takes_the_memory_of_bf16_and_less_time(tmp_path):
    plain, fp8 = plan_of(tmp_path), plan_of(tmp_path, "model.base_dtype=fp8")
    weights = [tree["memory"]["parts_bytes"]["weights"] for tree in (plain, fp8)]
    assert 0.99 < weights[1] / weights[0] < 1.002  # a scale per row in both directions; no spare columns
    products = [tree["step"]["parts"]["matrix products"] for tree in (plain, fp8)]
    assert 0.55 < products[1] / products[0] < 0.65
    assert fp8["step"]["tokens_per_s"] > 1.2 * plain["step"]["tokens_per_s"]
    with pytest.raises(UserError, match="NVIDIA A100 SXM 80 GB does not multiply in FP8"):
        plan_of(tmp_path, "model.base_dtype=fp8", gpu="a100-80")
    config = load_config("llama3_8b_lora", [f"model.path={tmp_path / 'model'}", "model.base_dtype=fp8"])
    assert fitted(config, Cluster(), tmp_path / "fits.yaml", recipe="x").engine.zero_stage in (1, 2)


def test_time_grows_with_work_and_shrinks_with_gpus(tmp_path):
    def step(*overrides, **cluster):
        return plan_of(tmp_path, *overrides, **cluster)["step"]

    assert step()["seconds"] > step("engine.activation_checkpointing=false")["seconds"]
    assert step(gpu="h100")["tokens_per_s"] > 2 * step(gpu="a100-80")["tokens_per_s"]
    wide = "batch.global_rows=512"
    few, many = step(wide, nodes=1), step(wide, nodes=8)
    assert 6 < many["tokens_per_s"] / few["tokens_per_s"] <= 8
    full = ["method.kind=full", "engine.zero_stage=2", wide]
    assert step(*full, nodes=8)["parts"]["communication"] > 20 * step(wide, nodes=8)["parts"]["communication"]
    assert step(*full, nodes=8, network=3e9)["seconds"] > 1.5 * step(*full, nodes=8)["seconds"]


def test_gpus_are_found_by_common_names():
    for name, key in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40S", "l40s"),
        ("A100-80GB:8", "a100-80"),
        ("AMD Instinct MI300X", "mi300x"),
    ):
        assert gpu_like(name) == gpu_named(key), name
    assert gpu_like("Tesla T4") is None
    for chip in gpus().values():
        assert chip.attention < chip.matmul < chip.flops


def test_the_picture_is_one_file(tmp_path, cli):
    picture = tmp_path / "plan.html"
    done = cli("plan", "smoke", "--gpu", "l40s", "--picture", str(picture))
    assert done.returncode == 0, done.stderr
    text = picture.read_text()
    assert "http" not in text.replace("http://www.w3.org", "")
    for drawing in text.split("<svg")[1:]:
        ET.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
    assert text.count("<svg") == 3
    assert "optimizer state" in text


def test_lines_for_people(tmp_path):
    text = table(plan_of(tmp_path, price=2.0, tokens=10_000_000, preemptions=2.0))
    for line in ("fits", "tokens/s", "total", "Young/Daly", "$"):
        assert line in text
    assert "flash" in table(plan_of(tmp_path, "model.kernels=off"))
    assert "DOES NOT FIT" in table(plan_of(tmp_path, gpu="4090", recipe="llama3_8b_full_zero3"))
    assert "--tokens" in table(plan_of(tmp_path, "data.train=s3://bucket/data"))


def test_host_memory_counts_offloaded_state(tmp_path):
    inside = plan_of(tmp_path, recipe="llama3_8b_full_zero3")["memory"]["host_bytes"]
    outside = plan_of(tmp_path, "engine.offload=cpu", recipe="llama3_8b_full_zero3")["memory"]["host_bytes"]
    assert outside - inside > 8e9 / 8 * 8


def test_a_gpu_that_is_not_in_the_table(cli):
    done = cli("plan", "smoke", "--gpu", "tpu")
    assert done.returncode == 2
    assert "h100" in done.stderr
    assert "Traceback" not in done.stderr


def test_unwritable_folders_are_reported(tmp_path, cli):
    done = cli("plan", "smoke", "--gpu", "h100", "--fit", str(tmp_path / "no" / "recipe.yaml"))
    assert done.returncode == 2
    assert "recipe.yaml: cannot be written" in done.stderr
    config = load_config("llama3_8b_full_zero3", [f"model.path={folder(LLAMA_70B, tmp_path / 'm')}"])
    with pytest.raises(ConfigError, match="no setting fits"):
        fitted(config, Cluster(gpu="4090", gpus_per_node=1), tmp_path / "x.yaml", recipe="x")


def test_memory_is_counted_once(tmp_path):
    config = load_config("llama3_8b_lora", [f"model.path={folder(LLAMA_8B, tmp_path / 'model')}"])
    memory = memory_plan(Cluster().job(config))
    assert sum(memory.parts.values()) == memory.peak
    assert max(nbytes for _, nbytes in memory.timeline) == memory.tensors


def test_an_update_costs_its_kernels_as_well_as_its_bytes():
    """With 448 adapter tensors, stage 2's work per tensor takes longer than moving the data."""
    h100 = gpu_named("h100")

    def update(ranks, *overrides):
        config = load_config("llama3_8b_lora", ["engine.zero_stage=auto", "batch.global_rows=16", *overrides])
        job = Job(shape(LLAMA_8B), config, ranks, 8, gpu=True)
        assert len(job.trained) == 448
        return job.stage, job.micro_batches, update_s(job, h100)

    stage, micro_batches, flat = update(8)
    assert stage == 1
    assert flat < 1.5e-3 * micro_batches
    _, _, visited = update(8, "engine.zero_stage=2")
    assert visited > flat + micro_batches * 448 * 3 * LAUNCH_S
    _, _, eight = update(8, "optim.kind=adamw_8bit")
    assert eight > flat + 448 / 8 * 30 * LAUNCH_S


def test_heads_too_wide_for_our_attention_backward_take_more_for_its_sums():
    settings = ["model.dtype=bf16", "batch.micro_rows=2", "batch.global_rows=2", "data.max_length=4096"]

    def sums(width):
        wide = shape(LLAMA_8B | {"head_dim": width})
        return Walk(Job(wide, load_config("smoke", settings), 1, 8, gpu=True), Ledger())._wide_heads()

    assert sums(128) == 0
    # three splits over 132 processors, in fp32, with 128 more rows per segment; and dK, dV of every query head
    assert sums(256) == 3 * (2 * 4096 + 128 * 2) * 32 * 256 * 4 + 2 * (2 * 4096) * 32 * 256 * 2
