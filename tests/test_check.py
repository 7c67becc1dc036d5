"""The checks ahead of a run judge the options of a method by the model that transformers builds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ft_dist.check import check, check_method
from ft_dist.config import RunConfig, load_config
from ft_dist.errors import ModelError
from ft_dist.run.proof.check_model import check_model
from tests.families.architectures import make


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
