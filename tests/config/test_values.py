"""What no key of its kind accepts, for every key of the schema, and YAML that was written to harm its reader."""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from ft_dist.config import dump_config, load_config, validate
from ft_dist.config.load import _fields
from ft_dist.config.schema import RunConfig
from ft_dist.config.yaml_text import read_yaml
from ft_dist.errors import ConfigError
from ft_dist.method.section import LocalPath, Place

SMALL = {"model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}, "output_dir": "runs/x"}
KEYS = list(_fields(RunConfig))
FLOATS = sorted({path for path, _, members in KEYS if float in members})


def paths_of_kind(kind: Any, model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """The keys whose annotation is `kind`, possibly optional."""
    found = []
    for name, field in model.model_fields.items():
        parts = parts_of(field.annotation)
        sections = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        for section in sections:
            found += paths_of_kind(kind, section, f"{prefix}{name}.")
        checks = [check for part in (field, *parts) for check in getattr(part, "metadata", ())]
        checks += [check for part in parts for check in getattr(part, "__metadata__", ())]
        if not sections and kind.__metadata__[-1] in checks and len(kind.__metadata__) == len(checks):
            found.append(f"{prefix}{name}")
    return found


def parts_of(annotation: Any) -> list[Any]:
    return [annotation, *itertools.chain.from_iterable(parts_of(part) for part in getattr(annotation, "__args__", ()))]


INTEGERS = sorted({path for path, _, members in KEYS if any(int in parts_of(member) for member in members)})
LOCAL, PLACES = paths_of_kind(LocalPath), paths_of_kind(Place)


def with_value(key: str, value: Any) -> dict[str, Any]:
    """`SMALL` with `key` set. Keys of data.train and data.eval belong to the first source."""
    tree: dict[str, Any] = yaml.safe_load(yaml.safe_dump(SMALL))
    *parents, leaf = key.split(".")
    node: Any = tree
    for name in parents:
        node = node.setdefault(name, [{"path": "b.jsonl"}] if name == "eval" else {})
        node = node[0] if isinstance(node, list) else node
    node[leaf] = value
    return tree


def refused(key: str, value: Any) -> str:
    with pytest.raises(ConfigError) as error:
        validate(with_value(key, value))
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 1000
    return line


def test_the_lists_of_keys_are_not_empty() -> None:
    assert set(LOCAL) == {
        "model.chat_template",
        "data.cache_dir",
        "engine.nvme_path",
        "checkpoint.resume",
        "output_dir",
    }
    assert set(PLACES) == {"model.path", "data.train.path", "data.eval.path", "checkpoint.path"}
    assert len(FLOATS) > 12
    assert len(INTEGERS) > 20


@pytest.mark.parametrize("key", FLOATS)
def test_every_float_is_finite_and_no_boolean(key: str) -> None:
    for value in (float("inf"), float("-inf"), float("nan"), ".inf", "nan", 10**400):
        assert key.rpartition(".")[2] in refused(key, value)
    assert "is a boolean" in refused(key, True)


@pytest.mark.parametrize("key", INTEGERS)
def test_every_integer_fits_64_bits_and_is_no_boolean(key: str) -> None:
    for value in (2**63, 10**300, "9" * 5000, 1e300, -1):
        assert key.rpartition(".")[2] in refused(key, value)
    assert "boolean" in refused(key, True)


@pytest.mark.parametrize("key", LOCAL + PLACES)
def test_every_path_can_exist(key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    odd = ("a\nb", "a\x00b", "a\x1b", "a\u2028b", "\ud800", "", " ")
    for value in (*odd, "x" * 256, "é" * 128, "a/" * 2000, "~nobody9/x"):
        assert key.rpartition(".")[2] in refused(key, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = with_value(key, "~/my folder")
    assert f"{tmp_path}/my folder" in dump_config(validate(tree))


@pytest.mark.parametrize("key", LOCAL)
def test_a_folder_of_this_machine_is_no_url(key: str) -> None:
    assert "s3://bucket/run is a URL" in refused(key, "s3://bucket/run")


@pytest.mark.parametrize("url", ["s3://", "gs:///run", "://x", "file://", "file:///"])
def test_a_mirror_names_its_bucket(url: str) -> None:
    assert "names no bucket or folder" in refused("checkpoint.path", url)
    validate(with_value("checkpoint.path", "s3://bucket"))
    validate(with_value("checkpoint.path", "file:///tmp/x"))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n" for before, after in itertools.pairwise("abcdefghi")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, after in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    "text, message",
    [
        (BOMB, "more than 50,000 values, counting what aliases stand for"),
        (MERGES, "more than 50000 keys|unknown key"),
        ("model: &m {<<: *m}", "unconstructable recursive|path: required"),
        ("model: &m {path: *m}", "unconstructable recursive|found undefined alias|more than 32 levels"),
        ("model: &m [*m]", "more than 32 levels, or an alias inside itself"),
        ("model: " + "[" * 100_000, "more than 32 levels"),
        ("seed: 1\nseed: 2", "line 2, column 1: not valid YAML .a second 'seed'"),
        ("1: x", "the key 1 is not text"),
        ("[a]: x", "found unhashable key"),
        ("? {a: b}\n: x", "found unhashable key"),
        ('"a\\nb": x', "the key 'a.*b' has the control character"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("seed: 0x" + "f" * 5000, "an integer of 20,000 bits"),
        ("seed: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("seed: !!binary aGk=", "a bytes, where only text and numbers"),
        ("seed: !!set {a, b}", "a set, where only text and numbers"),
        ("seed: !!int x", "not valid YAML"),
        ("seed: !!timestamp 2026-99-99", "not valid YAML"),
        ("a: " + "x" * 1_000_000, "more than 1,000,000 bytes"),
        ("\x00", "not valid YAML"),
        ("null", "contains NoneType, but a config is a mapping"),
    ],
    ids=range(21),
)
def test_hostile_yaml_is_one_line_at_once(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=message) as error:
        load_config(str(path))
    assert time.monotonic() - began < 5
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_aliases_and_merges_of_a_usual_size_work(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {path: m}\ndata:\n  train: [&s {path: a, weight: 2}]\n  eval: [{<<: *s, weight: 1}]\noutput_dir: runs\n"
    )
    config = load_config(str(path))
    assert (config.data.eval[0].path, config.data.eval[0].weight) == ("a", 1.0)


def test_dates_and_times_are_text_and_numbers_are_decimal(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: [2026-01-31, 4:00:00, 1:30.5, 010, '1']\nb: [1_000, 0x1F, 1e-3, 1.5, .5, -.inf, +7, ~]\n")
    text = ["2026-01-31", "4:00:00", "1:30.5", "010", "1"]
    assert read_yaml(path) == {"a": text, "b": [1000, 31, 1e-3, 1.5, 0.5, float("-inf"), 7, None]}


@pytest.mark.parametrize(
    "override, message",
    [
        ("a.b.c=", "a: unknown key"),
        ("a..b=1", "must have the form key.sub=value"),
        (".=1", "must have the form key.sub=value"),
        ("=1", "must have the form key.sub=value"),
        ("a\nb=1", "must have the form key.sub=value"),
        ("output_dir=a\nb", "has the control character"),
        ("data.train.²=1", "numbered from 0"),
        ("data.train.-1=x", "numbered from 0"),
        (f"data.train.{'9' * 5000}=1", "numbered from 0"),
        (f"{'a.' * 1000}b=1", "no key has 1001 parts"),
        (f"seed={'9' * 5000}", "seed"),
        (f"seed={'[' * 5000}", "seed"),
        (f"seed={'x' * 5000}", "seed"),
    ],
    ids=range(13),
)
def test_odd_overrides_are_one_line(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(ConfigError, match=message) as error:
        load_config(str(path), [override])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "/dev/null", "x/" * 3000])
def test_an_odd_name_of_a_config_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(name)
    assert "\n" not in str(error.value)


def test_many_problems_are_a_short_line() -> None:
    line = refused("model.path", 5) and refused("optim", {f"key{number}": 1 for number in range(5000)})
    assert line.endswith("And 4,995 more problems.")


@pytest.mark.parametrize("text", ["1e5", "true", "null", "0x10", "12", "", "~", ".inf", "plain", "2026-11-28"])
def test_a_dumped_config_reads_back_as_it_was(tmp_path, text):
    config = load_config("smoke", [])
    config.observe.run_name = text
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(path), []).observe.run_name == text
