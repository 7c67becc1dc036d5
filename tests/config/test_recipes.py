"""Every shipped recipe is a valid config, by path and by name, and the CPU ones name data that is shipped with them."""

from pathlib import Path

import pytest
import yaml

from ft_dist.config import load_config
from ft_dist.config.load import recipe_folder
from ft_dist.model.builtin import builtin_names, resolve_model

FOLDER = recipe_folder()
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_promised_recipes_are_there() -> None:
    promised = (
        "quickstart smoke llama3_8b_lora llama3_8b_full_zero3 qwen3_8b_lora mistral_7b_lora phi3_lora gemma3_lora"
    )
    assert set(promised.split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_valid(name: str) -> None:
    by_name, by_path = load_config(name), load_config(str(FOLDER / f"{name}.yaml"))
    assert by_name == by_path
    assert by_name.output_dir == f"runs/{name}"
    assert by_name.method.kind == ("full" if "full" in name else "lora")
    assert by_name.batch.global_rows >= by_name.batch.micro_rows
    if by_name.model.path not in builtin_names():
        assert resolve_model(by_name.model.path) == by_name.model.path  # a hub id


@pytest.mark.parametrize("name", ["quickstart", "smoke"])
def test_cpu_recipes_ship_their_data(name: str) -> None:
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    for path in [*raw["data"]["train"], *raw["data"]["eval"]]:
        assert (FOLDER / path).is_file()
    assert raw["model"]["path"] in builtin_names()
    assert Path(raw["output_dir"]).parts[0] == "runs"


def test_smoke_takes_the_overrides_of_the_test_matrix() -> None:
    config = load_config("smoke", ["model.dtype=fp32", "method.kind=full", "engine.zero_stage=3", "batch.micro_rows=2"])
    assert (config.model.dtype, config.method.kind, config.engine.zero_stage) == ("fp32", "full", 3)
    assert config.optim.max_steps is not None
    assert config.optim.max_steps >= 10
    assert config.checkpoint.interval_steps == 5
