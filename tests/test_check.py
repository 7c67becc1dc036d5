"""`ft-dist check` judges a method by the model that transformers builds, and refuses what a resume would refuse."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from transformers import AutoModelForCausalLM

from ft_dist.check import check, check_data, check_method
from ft_dist.config import RunConfig, load_config
from ft_dist.errors import CheckpointError, ConfigError, DataError, ModelError
from ft_dist.model.load import load_model
from ft_dist.model.tiny import make_tiny
from ft_dist.result.load import find_weights
from ft_dist.run.proof.check_model import check_model
from tests.conftest import SMALL_RUN, start_cli
from tests.families.architectures import make

SETTINGS = [*(each for each in SMALL_RUN if "packing" not in each), "optim.max_steps=1"]
LIVE = "data.train=[{path: configs/emails/train.jsonl, live: true}]"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The settings of two runs with a commit: one of a prepared source, one of a live one."""
    folder = tmp_path_factory.mktemp("earlier")
    runs = [[*SETTINGS, f"output_dir={folder / 'prepared'}"], [*SETTINGS, LIVE, f"output_dir={folder / 'live'}"]]
    for run in runs:
        process = start_cli("train", *run, "--nproc", "1")
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return runs


def test_a_warm_up_ends_within_the_run():
    config = load_config("smoke", ["optim.max_steps=5", "optim.warmup_steps=6"])
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps=6 is more than optim\.max_steps=5: .* Use at most 5"):
        check(config, world_size=1)


def checked(settings, *overrides):
    config = load_config(settings[0], [*settings[1:], *overrides])
    check(config, world_size=1)
    check_data(config)


ALLOWED = ["optim.lr=0.1", "batch.global_rows=3", "engine.zero_stage=3", "data.packing=true", "optim.max_steps=5"]


@pytest.mark.parametrize("override", ALLOWED)
def test_what_a_resume_may_change_is_ready(earlier, override):
    for settings in earlier:
        checked(settings, override)


@pytest.mark.parametrize("override", ["seed=5", "data.packing=false", "data.curriculum=length", "data.max_length=400"])
def test_another_order_of_the_data_is_refused(earlier, override):
    prepared, live = earlier
    with pytest.raises(DataError, match="the checkpoint's position belongs to another order of the data: seed, "):
        checked(prepared, override)
    with pytest.raises(DataError, match=r"the checkpoint's position does not match .*train.jsonl: the source, "):
        checked(live, override)


def test_the_identity_of_the_run_is_checked(earlier):
    for settings in earlier:
        with pytest.raises(CheckpointError, match=r"method.rank=4: the checkpoint .* was made with method.rank=8"):
            checked(settings, "method.rank=4")
        with pytest.raises(CheckpointError, match="its weights differ from those of tiny-llama"):
            checked(settings, "model.path=tiny-qwen3")
        checked(settings, "method.rank=4", "output_dir=runs/another")
    folder = load_config(earlier[0][0], earlier[0][1:]).run_dir
    commit = next((folder / "checkpoints").glob("step-*"))
    with pytest.raises(CheckpointError, match=r"method\.rank=4"):
        checked(earlier[0], "method.rank=4", f"checkpoint.resume={commit}", "output_dir=runs/another")


def test_a_changed_function_of_the_base_is_refused(cli, tmp_path):
    make_tiny("tiny-llama", tmp_path / "model")
    file = tmp_path / "model/config.json"
    tree = json.loads(file.read_text())
    settings = [*SETTINGS, f"model.path={file.parent}", f"output_dir={tmp_path / 'run'}"]
    assert cli("train", *settings, "--nproc", "1").returncode == 0
    checked(settings, "optim.max_steps=2")
    file.write_text(json.dumps(tree | {"rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=r"its config\.json differs from that of"):
        checked(settings, "optim.max_steps=2")


def test_an_adapter_inside_the_model_is_refused(tmp_path):
    """transformers would load it too, and freeze the model."""
    model, apart = tmp_path / "model", tmp_path / "adapter"
    make_tiny("tiny-llama", model)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(model)
    refusal = f"model.path={model}: holds an adapter as well as a model"
    settings = ["smoke", f"model.path={model}", "method.kind=full", f"output_dir={tmp_path / 'run'}"]
    config = load_config(settings[0], settings[1:])
    with pytest.raises(ModelError, match=refusal):
        check(config, world_size=1)
    with pytest.raises(ModelError, match=refusal):
        find_weights(str(model))
    with pytest.raises(ModelError, match=refusal):  # as from the hub, whose files are not seen before
        load_model(config.model, folder=str(model), vocabulary=1)
    apart.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (model / name).rename(apart / name)
    checked(settings)
    assert find_weights(str(apart)).base == str(model)


def test_the_command_says_so(earlier, cli):
    done = cli("check", *earlier[0], "method.rank=4", "--nproc", "1")
    assert done.returncode == 2
    assert "ready to train" not in done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("ft-dist: error: method.rank=4: the checkpoint ")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("mixtral", "jetmoe", "falcon_h1"):
        make(name, folder / name)
    return folder


def config_of(model: Path, *overrides: str) -> RunConfig:
    return load_config("smoke", [f"model.path={model}", f"output_dir={model / 'run'}", *overrides])


@pytest.mark.parametrize(
    "option",
    [
        "exclude_modules=mlp",
        "modules_to_save=mlp.gate",
        "target_modules=q_proj,gate_up_proj",
        "target_modules=q_proj,gate_proj,up_proj",
    ],
)
def test_names_of_the_loaded_model_count_where_its_files_have_others(models, option):
    config = config_of(models / "mixtral", f"method.{option}")
    check(config, world_size=1)
    check_method(config)
    check_model(config, weights=False)


def test_names_of_the_files_alone_are_refused(models):
    config = config_of(models / "mixtral", "method.exclude_modules=block_sparse_moe")
    check(config, world_size=1)
    with pytest.raises(ModelError, match="exclude_modules=block_sparse_moe: matches no module of this model"):
        check_method(config)


@pytest.mark.parametrize(
    "name, note",
    [
        ("falcon_h1", "2 x out_proj left out: its layer reads the weight itself, past an adapter"),
        ("jetmoe", "are left out: adapters on experts of this architecture do not exist yet"),
    ],
)
def test_what_all_linear_leaves_out_is_said(models, name, note):
    config = config_of(models / name)
    check(config, world_size=1)
    assert [line for line in check_method(config) if line.endswith(note)]


def test_a_model_that_transformers_does_not_know(models, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(ModelError, match="transformers cannot load it"):
        check_method(config_of(tmp_path))


def test_an_agent_never_imports_torch(models, tmp_path):
    """Its rank does, and refuses the run before output_dir exists."""
    arguments = ["smoke", f"model.path={models / 'mixtral'}", f"output_dir={tmp_path / 'run'}", "--nproc", "1"]
    code = (
        "import sys; from ft_dist.launcher.agent import main; code = main(sys.argv[1:]); "
        "sys.exit(code if 'torch' not in sys.modules else 'the agent imported torch')"
    )
    command = [sys.executable, "-c", code, *arguments, "method.target_modules=block_sparse_moe"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "method.target_modules=block_sparse_moe: matches no linear layer of this model" in done.stderr
    assert not (tmp_path / "run").exists()
