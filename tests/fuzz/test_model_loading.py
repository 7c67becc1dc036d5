"""Changed configs, tokenizers and chat templates through transformers, as `ft-dist check` loads them."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_dist.check import check, check_data, check_method
from ft_dist.config import RunConfig, load_config
from ft_dist.model.builtin import fetch
from tests.fuzz.bounds import outcome
from tests.fuzz.mutations import altered, damaged

FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    place = tmp_path_factory.mktemp("loading")
    shutil.copytree(fetch("tiny-llama"), place / "model")
    return load_config("smoke", [f"model.path={place / 'model'}", f"output_dir={place / 'run'}"])


def attempt(config: RunConfig, name: str, content: bytes) -> None:
    folder = Path(config.model.path)
    for file in FILES:
        shutil.copy(fetch("tiny-llama") / file, folder / file)
    (folder / name).write_bytes(content)

    def checked() -> None:
        check(config, world_size=1)
        check_method(config)
        check_data(config)

    outcome(checked)


@given(data=st.data(), name=st.sampled_from([name for name in FILES if name.endswith(".json")]))
def test_any_values(config: RunConfig, name: str, data: st.DataObject) -> None:
    tree = json.loads((fetch("tiny-llama") / name).read_text())
    attempt(config, name, json.dumps(data.draw(altered(tree))).encode())


@given(data=st.data(), name=st.sampled_from(FILES))
def test_any_bytes(config: RunConfig, name: str, data: st.DataObject) -> None:
    attempt(config, name, data.draw(damaged((fetch("tiny-llama") / name).read_bytes())))
