"""Folders of models whose JSON, headers and indexes were changed, through everything that reads them without torch."""

import copy
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_dist.checkpoint.identity import _config_digest
from ft_dist.errors import UserError
from ft_dist.model.builtin import fetch, resolve_model
from ft_dist.model.facts import check_weights, holds_weights, model_facts
from ft_dist.model.shape import model_shape
from ft_dist.result.load import find_weights
from tests.fuzz.bounds import outcome

NUMBERS = [0, -1, 1, 2**31, 2**63, 10**400, 1.5]
ODD: list[Any] = [None, True, *NUMBERS, "", "x", "../../x", "/etc/passwd", "a\nb", "²", [], {}, [[]]]
trees = st.recursive(
    st.sampled_from(ODD) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama in two weight files with an index, and an adapter's folder in it."""
    place = tmp_path_factory.mktemp("models") / "model"
    shutil.copytree(fetch("tiny-llama"), place)
    whole = (place / "model.safetensors").read_bytes()
    (place / "whole").write_bytes(whole)
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_model.safetensors").touch()
    return place


def restore(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the values of the unchanged weights, and nothing else in the folder that an example left."""
    whole = (folder / "whole").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    shutil.copy(fetch("tiny-llama") / "config.json", folder / "config.json")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def read(folder: Path) -> None:
    resolve_model(str(folder))
    holds_weights(folder)
    model_facts(folder)
    check_weights(folder)
    _config_digest(folder / "config.json")
    sum(parameter.numel for parameter in model_shape(str(folder)).parameters)


def changed(tree: Any, data: st.DataObject) -> Any:
    """`tree` with a few values at any depth replaced."""
    for _ in range(data.draw(st.integers(1, 3))):
        node = tree
        while isinstance(node, dict) and node:
            key = data.draw(st.sampled_from(sorted(node)))
            if not isinstance(node[key], dict) or data.draw(st.booleans()):
                if isinstance(node[key], list) and node[key] and data.draw(st.booleans()):
                    node[key][data.draw(st.integers(0, len(node[key]) - 1))] = copy.deepcopy(data.draw(trees))
                else:
                    node[key] = copy.deepcopy(data.draw(trees))
                break
            node = node[key]
    return tree


@given(data=st.data())
def test_any_config(folder: Path, data: st.DataObject) -> None:
    restore(folder)
    config = json.loads((folder / "config.json").read_text())
    more = data.draw(st.dictionaries(st.sampled_from(["text_config", "num_experts", "head_dim"]), trees, max_size=2))
    (folder / "config.json").write_text(json.dumps(changed(config | more, data)))
    outcome(lambda: read(folder))


@given(data=st.data())
def test_any_header(folder: Path, data: st.DataObject) -> None:
    header, values = restore(folder)
    content = json.dumps(changed(header, data)).encode()
    length = data.draw(st.just(len(content)) | st.sampled_from([0, 1, 2**63, len(content) - 1, len(content) + 1]))
    values = values[: data.draw(st.just(len(values)) | st.integers(0, len(values)))]
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + content + values)
    found = outcome(lambda: read(folder))
    if not isinstance(found, UserError):  # only a change of metadata is none of the weights
        again = json.loads(content)
        assert {name: each for name, each in again.items() if name != "__metadata__"} == {
            name: each for name, each in restore(folder)[0].items() if name != "__metadata__"
        }


@given(data=st.data())
def test_any_index(folder: Path, data: st.DataObject) -> None:
    header, _ = restore(folder)
    names = [name for name in header if name != "__metadata__"]
    tree = changed({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}, data)
    (folder / "model.safetensors.index.json").write_text(json.dumps(tree))
    outcome(lambda: read(folder))


@given(name=st.sampled_from(["config.json", "model.safetensors", "model.safetensors.index.json"]), data=st.data())
def test_any_damage(folder: Path, name: str, data: st.DataObject) -> None:
    restore(folder)
    content = bytearray((folder / name).read_bytes() if (folder / name).exists() else b'{"weight_map": {}}')
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, min(len(content), 4000) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(content)))
    nested = data.draw(st.sampled_from([b"", b"[" * 100_000, b'{"a":' * 3000 + b"1" + b"}" * 3000, b"9" * 5000]))
    (folder / name).write_bytes(nested or bytes(content[:cut]))
    outcome(lambda: read(folder))


@given(data=st.data())
def test_any_adapter(folder: Path, data: st.DataObject) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "tiny-llama", "megatron_config": None, "r": 4}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(changed(config, data)))
    outcome(lambda: find_weights(str(folder / "adapter"), progress=lambda line: None))
