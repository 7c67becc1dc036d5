"""What a resumed run may change, and what it may not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ft_dist.checkpoint.identity import base_model, check_identity, config_hash
from ft_dist.checkpoint.identity import identity as identity_of
from ft_dist.checkpoint.state import RunState
from ft_dist.config.load import validate
from ft_dist.errors import CheckpointError


def config(**sections):
    tree = {"model": {"path": "m"}, "data": {"train": ["a.jsonl"]}, "output_dir": "runs/x"}
    for name, keys in sections.items():
        tree[name] = {**(tree.get(name) or {}), **keys}
    return validate(tree)


@pytest.fixture
def base(tmp_path):
    save_file({"w": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    return tmp_path


def identity(run, *, folder):
    return identity_of(run, base=base_model(run, folder))


def state(run, folder):
    """What a commit stores of the identity."""
    saved = RunState(step=1, **identity(run, folder=str(folder))).to_dict()
    return RunState.from_dict(json.loads(json.dumps(saved))).identity


def check(before, after, base, other=None):
    return check_identity(state(before, base), identity(after, folder=str(other or base)), where=base)


def test_settings_of_the_execution_may_change_and_are_shown(base):
    after = config(
        engine={"zero_stage": 3, "offload": "cpu"}, batch={"micro_rows": 4}, model={"dtype": "fp32"}, optim={"lr": 1e-5}
    )
    changes = check(config(), after, base)
    assert changes == [
        'model.dtype: "bf16" -> "fp32"',
        "batch.micro_rows: 1 -> 4",
        "optim.lr: 0.0002 -> 1e-05",
        'engine.zero_stage: "auto" -> 3',
        'engine.offload: "none" -> "cpu"',
    ]
    assert check(config(), config(), base) == []
    assert check(config(), config(model={"base_dtype": "fp8"}), base) == ['model.base_dtype: null -> "fp8"']


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("method", "kind", "full"),
        ("method", "rank", 8),
        ("method", "alpha", 1.0),
        ("method", "target_modules", ["q_proj"]),
        ("method", "exclude_modules", ["q_proj"]),
        ("method", "layers_to_transform", [0]),
        ("method", "modules_to_save", ["lm_head"]),
        ("method", "dora", True),
        ("model", "new_tokens", ["<x>"]),
    ],
)
def test_settings_that_give_tensors_their_meaning_may_not_change(base, section, key, value):
    with pytest.raises(CheckpointError, match=f"{section}.{key}="):
        check(config(), config(**{section: {key: value}}), base)


def test_lora_keys_do_not_restrict_full_fine_tuning(base):
    full = {"kind": "full"}
    assert check(config(method=full), config(method={**full, "rank": 8}), base) == []


def test_adapters_stay_with_their_base(base, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    save_file({"w": torch.arange(1000.0) + 1}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="its weights differ from those"):
        check(config(), config(), base, other)
    # full fine-tuning has all its weights in the checkpoint, but not the buffers
    with pytest.raises(CheckpointError, match="its weights differ from those"):
        check(config(method={"kind": "full"}), config(method={"kind": "full"}), base, other)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_function_of_the_base_may_not_change(base, kind):
    """The config of the base says what to compute with the weights, even with those in the checkpoint."""
    method = {"method": {"kind": kind}}
    tree = {"rms_norm_eps": 1e-6, "dtype": "float32", "text_config": {"rope_theta": 10000.0, "use_cache": True}}
    saved = state(config(**method), base)  # as in versions that stored no digest of the config
    (base / "config.json").write_text(json.dumps(tree))
    now = state(config(**method), base)
    assert check_identity(saved, now, where=base) == []
    same = tree | {"dtype": "bfloat16", "transformers_version": "5.0", "text_config": {"rope_theta": 10000.0}}
    (base / "config.json").write_text(json.dumps(same, indent=1))
    assert check_identity(now, state(config(**method), base), where=base) == []
    for changed in ({"rms_norm_eps": 1e-2}, {"text_config": {"rope_theta": 100.0}}):
        (base / "config.json").write_text(json.dumps(tree | changed))
        with pytest.raises(CheckpointError, match=r"model\.path=m: its config\.json differs from that of m, on which "):
            check_identity(now, state(config(**method), base), where=base)


def test_code_counts_if_it_is_trusted(base):
    trusting = config(model={"trust_remote_code": True})
    before = state(trusting, base)
    (base / "modeling.py").write_text("scale = 2")
    assert check(config(), config(), base) == []
    with pytest.raises(CheckpointError, match="its Python code differs"):
        check_identity(before, state(trusting, base), where=base)
    assert check_identity(before, state(config(), base), where=base) == ["model.trust_remote_code: true -> false"]


def test_digests_depend_on_content_not_on_the_path(base, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    assert base_model(config(), str(moved)) == base_model(config(), str(base))


def test_one_flipped_bit_of_a_large_base_is_found(base):
    """Between the samples that older versions compared, far from the header."""
    save_file({"w": torch.zeros(50 << 20)}, base / "model.safetensors")  # 200 MB
    saved = state(config(), base)
    with (base / "model.safetensors").open("r+b") as file:
        file.seek((1 << 20) + (1 << 20) + 12345)
        file.write(b"\x01")
    now = identity(config(), folder=str(base))
    assert saved["base"].digest == now["base"].digest, "not a sampled byte"
    with pytest.raises(CheckpointError, match=r"its weights differ from those of m \(model\.safetensors\)"):
        check_identity(saved, now, where=base)


def test_commits_of_older_versions_compare_samples(base):
    saved = state(config(), base)
    older = saved | {"base": saved["base"].model_copy(update={"files": None})}
    assert check_identity(older, identity(config(), folder=str(base)), where=base) == []
    save_file({"w": torch.arange(1000.0) + 1}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match="its weights differ from those"):
        check_identity(older, identity(config(), folder=str(base)), where=base)


def test_the_hash_does_not_depend_on_the_order_of_keys():
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
