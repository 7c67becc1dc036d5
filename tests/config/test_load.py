"""What a config may contain, and how each mistake in it is reported."""

import json
from typing import get_args

import jsonschema
import pytest
import yaml

from ft_dist.config import dump_config, json_schema, load_config, validate
from ft_dist.config.peer_names import PEER_NAMES
from ft_dist.config.schema import RunConfig
from ft_dist.errors import ConfigError

SMALL = {"model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}, "output_dir": "runs/x"}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def test_overrides_reach_any_depth_and_keep_their_type(recipe):
    overrides = ["optim.lr=2e-4", "data.train.0.weight=2", "method.target_modules=q_proj,v_proj", "engine.zero_stage=3"]
    config = load_config(str(recipe), overrides)
    assert config.optim.lr == 2e-4
    assert config.data.train[0].weight == 2.0
    assert config.method.target_modules == ["q_proj", "v_proj"]
    assert config.engine.zero_stage == 3


@pytest.mark.parametrize("text, layers", [("0,1", [0, 1]), ("1", [1]), ("[0, 1]", [0, 1])])
def test_layers_are_listed_with_commas_too(recipe, text, layers):
    config = load_config(str(recipe), [f"method.layers_to_transform={text}"])
    assert config.method.layers_to_transform == layers


def test_off_is_a_string_and_not_a_boolean(tmp_path):
    path = tmp_path / "off.yaml"
    path.write_text(yaml.safe_dump(SMALL) + "observe: {wandb: off, tensorboard: true}\n")
    config = load_config(str(path), ["model.kernels=off", "data.packing=false"])
    assert (config.observe.wandb, config.model.kernels) == ("off", "off")
    assert (config.observe.tensorboard, config.data.packing) == (True, False)


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.warmup_step=1", "unknown key. Did you mean optim.warmup_steps?"),
        ("zero_stage=2", "unknown key. Did you mean engine.zero_stage?"),
        ("optim.learnig_rate=1", "unknown key. Did you mean optim.lr?"),
        ("lora_r=8", "unknown key. Did you mean method.rank?"),
        ("data.train.0.wieght=2", "Did you mean data.train.weight?"),
        ("engine.zero_stage=7", "engine.zero_stage=7: should be 'auto', 0, 1, 2 or 3."),
        ("batch.global_rows=many", 'batch.global_rows="many": should be'),
        ("method.rank=0", "method.rank=0: should be greater than 0."),
        ("engine.offload=nvme", "engine: offload=nvme needs engine.nvme_path"),
        ("engine", "override 'engine' must have the form key.sub=value."),
        ("data.train.3.weight=1", "the list has 1 entries, numbered from 0"),
        ("data.train=[]", "data.train=[]"),
        ("data.packing=sometimes", "data.packing=\"sometimes\": should be a valid boolean or 'auto'."),
        ("method.target_modules=5", "method.target_modules=5: should be 'all-linear' or a valid list."),
        ("method.target_modules=[1]", "method.target_modules.0=1: should be a valid string."),
        ("method.layers_to_transform=0,x", 'method.layers_to_transform.1="x": should be a valid integer.'),
    ],
)
def test_a_mistake_names_key_rule_and_fix(recipe, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(str(recipe), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_key_names_of_peers_suggest_existing_keys():
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    for key in PEER_NAMES.values():
        section, _, name = key.partition(".")
        members = get_args(sections[section]) or (sections[section],)
        assert any(name in member.model_fields for member in members), key


def test_the_schema_accepts_what_the_loader_accepts(tmp_path):
    schema, base = (
        json.loads(json_schema()),
        {"model": {"path": "tiny-llama"}, "data": {"train": [{"path": "a.jsonl"}]}},
    )
    for method in ({}, {"rank": 4}, {"kind": "lora"}, {"kind": "full"}):
        jsonschema.validate({**base, "output_dir": "out", "method": method}, schema)
    for method in ({"kind": "foo"}, {"rnak": 4}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**base, "output_dir": "out", "method": method}, schema)


def test_yaml_mistakes_name_the_line(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("model:\n  path: [1\ndata: x\n")
    with pytest.raises(ConfigError, match=r"broken.yaml line 3"):
        load_config(str(path))


def test_a_missing_required_key_is_named():
    with pytest.raises(ConfigError, match="output_dir: required"):
        validate({"model": {"path": "m"}, "data": {"train": ["a"]}})


def test_a_misspelt_required_key_is_reported_once_and_as_unknown(tmp_path):
    tree = {"model": {"path": "m"}, "data": {"train": ["a"]}, "ouput_dir": "x"}
    with pytest.raises(ConfigError) as error:
        validate(tree)
    assert str(error.value) == "ouput_dir: unknown key. Did you mean output_dir?"
    with pytest.raises(ConfigError) as error:
        validate({"data": {"train": ["a"]}, "ouput_dir": "x", "moodel": {}, "zzz": 1, "seed": -1})
    assert str(error.value).startswith("ouput_dir: unknown key. Did you mean output_dir? moodel: unknown key.")
    assert ".;" not in str(error.value)


@pytest.mark.parametrize("name", ["smok", "Smoke", "configs/smoek.yaml"])
def test_a_misspelt_recipe_suggests_the_nearest(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"\. Did you mean smoke\?$"):
        load_config(name)


def test_data_is_also_looked_up_next_to_the_config(recipe):
    (recipe.parent / "a.jsonl").write_text("{}")
    assert load_config(str(recipe)).data.train[0].path == str(recipe.parent / "a.jsonl")


def test_the_resolved_config_loads_as_itself(recipe, tmp_path):
    config = load_config(str(recipe), ["optim.lr=1e-5"])
    again = tmp_path / "config.yaml"
    again.write_text(dump_config(config))
    assert load_config(str(again)) == config
