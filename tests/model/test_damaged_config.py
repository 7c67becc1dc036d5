"""A config.json that asks for endless layers is refused before transformers builds them."""

import json
import shutil
from pathlib import Path

import pytest

from ft_dist.config.schema import ModelConfig
from ft_dist.errors import ModelError
from ft_dist.model import load
from ft_dist.model.builtin import fetch
from ft_dist.model.facts import model_facts


def changed(folder: Path, **keys: object) -> Path:
    shutil.copytree(fetch("tiny-llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder


@pytest.mark.parametrize("keys", [{"num_hidden_layers": 2**63}, {"text_config": {"num_hidden_layers": 10_001}}])
def test_no_model_has_so_many_layers(tmp_path, keys):
    with pytest.raises(ModelError, match=r"num_hidden_layers=.* which no model can have"):
        model_facts(changed(tmp_path / "model", **keys))


def test_modules_that_the_weights_cannot_fill(tmp_path, monkeypatch):
    folder = changed(tmp_path / "model", num_hidden_layers=3000, layer_types=None)
    monkeypatch.setattr(load, "MOST_MODULES", 2000)
    with pytest.raises(ModelError, match="asks for more than 2,420 modules, but the weights are 21 tensors"):
        load.outline(ModelConfig(path=str(folder)), folder=str(folder))
    assert not load.torch.nn.modules.module._global_module_registration_hooks


def test_a_model_within_its_weights_is_built(tmp_path):
    folder = changed(tmp_path / "model")
    assert load.outline(ModelConfig(path=str(folder)), folder=str(folder))
