"""Any value of any key, as a tree, as an override, and as YAML text."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ft_dist.check import _check_batch, _check_evaluation, _check_output
from ft_dist.config import RunConfig, dump_config, load_config, recipe_folder
from ft_dist.config.load import _fields
from ft_dist.engine.settings import deepspeed_config, effective_stage
from ft_dist.errors import UserError
from ft_dist.optim.schedule import learning_rate
from tests.fuzz.bounds import outcome

RECIPES = {path.stem: path.read_text() for path in sorted(recipe_folder().glob("*.yaml"))}
KEYS = sorted({path for path, _, _ in _fields(RunConfig)})
EXTREMES = [0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**18, 10**400, 0.0, -0.0, 1e-320, 1e308, float("inf"), float("nan")]
TEXTS = [
    "", " ", "a\nb", "\x00", "\x1b[2J", "\ud800", "\u2028", "~", "~nobody", "~/x", "..", "/", "//", "s3://", "s3://b/r",
    "hf://", "://", "file://", "x" * 300, "a/" * 3000, "9" * 5000, "1e999", "0x" + "f" * 5000, "nan", "null",
    "true", "[", "{a: b}", "*a", "&a", "!!python/object:os.system", "2026-01-31", "4:00:00", "{{ x }}", "$(id)", "%s",
    "²", "é\U0001f600", "auto", "never",
]  # fmt: skip

scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(EXTREMES), st.integers(), st.floats(), st.sampled_from(TEXTS), st.text()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | scalars, inner, max_size=4),
    max_leaves=8,
)
odd_names = st.lists(st.sampled_from(["a", "", "0", "path", "train", "²"]), max_size=5).map(".".join)
names = st.sampled_from(KEYS) | odd_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


def read(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> None:
    """Load a config, and do with it what needs no model and no data."""
    config = load_config(str(path), overrides)
    _check_batch(config, 1)
    _check_evaluation(config)
    _check_output(config.run_dir)
    deepspeed_config(config, stage=effective_stage(config, 1, trainable=10), device_type="cpu")
    steps = config.optim.max_steps or 100
    for step in {1, steps // 2 + 1, steps}:
        assert 0 <= learning_rate(config.optim, step=step, total_steps=steps) < float("inf")
    again = path.with_name("again.yaml")
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(again)) == config, "the resolved config is another"


def put(tree: Any, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        node = tree.get(name) if isinstance(tree, dict) else None
        if not isinstance(node, dict | list):
            node = {}
            if isinstance(tree, dict):
                tree[name] = node
        tree = next((each for each in node if isinstance(each, dict)), {}) if isinstance(node, list) else node
    tree[leaf] = value


@given(recipe=st.sampled_from(sorted(RECIPES)), changes=st.lists(st.tuples(names, values), min_size=1, max_size=3))
def test_any_value(folder: Path, recipe: str, changes: list[tuple[str, Any]]) -> None:
    tree = yaml.safe_load(RECIPES[recipe])
    for key, value in changes:
        put(tree, key, value)
    path = folder / "config.yaml"
    try:
        path.write_text(yaml.dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    except (ValueError, yaml.YAMLError):  # too long to print as a number
        return
    outcome(lambda: read(path))


@given(
    recipe=st.sampled_from(sorted(RECIPES)),
    overrides=st.lists(st.tuples(names, st.sampled_from(TEXTS) | st.text() | values.map(str)), min_size=1, max_size=3),
)
def test_any_override(folder: Path, recipe: str, overrides: list[tuple[str, str]]) -> None:
    path = folder / "config.yaml"
    path.write_text(RECIPES[recipe])
    outcome(lambda: read(path, ["=".join(each) for each in overrides]))


@given(
    recipe=st.sampled_from(sorted(RECIPES)),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(TEXTS) | st.text(max_size=20)), max_size=6),
    cut=st.integers(0, 10**6),
)
def test_any_text(folder: Path, recipe: str, edits: list[tuple[int, str]], cut: int) -> None:
    text = RECIPES[recipe]
    for at, piece in edits:
        place = at % (len(text) + 1)
        text = text[:place] + piece + text[place + len(piece) % 3 :]
    path = folder / "config.yaml"
    path.write_bytes(text[: cut % (2 * len(text) + 1)].encode(errors="surrogatepass"))
    outcome(lambda: read(path))


@given(content=st.binary(max_size=400))
def test_any_bytes(folder: Path, content: bytes) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    assert isinstance(outcome(lambda: read(path)), UserError)


@given(depth=st.integers(1, 3000), kind=st.sampled_from(["[", "{a: ", "- ", "a:\n", "? "]), width=st.integers(1, 9))
def test_any_depth(folder: Path, depth: int, kind: str, width: int) -> None:
    path = folder / "config.yaml"
    indented = kind.endswith("\n")
    lines = "".join(" " * (index * indented) + kind for index in range(min(depth, 500)))
    chain = itertools.pairwise(f"k{index}" for index in range(min(depth, 12)))
    aliases = "".join(f"{after}: &{after} [{', '.join([f'*{before}'] * width)}]\n" for before, after in chain)
    path.write_text(lines if depth % 2 else f"k0: &k0 [x]\n{aliases}")
    assert isinstance(outcome(lambda: read(path)), UserError)
