"""Turns a YAML file or recipe name with `key.sub=value` overrides into a validated `RunConfig`.

Relative data paths are looked up from the working directory first, then from the folder of the config file.
"""

import contextlib
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ft_dist.config.peer_names import PEER_NAMES
from ft_dist.config.schema import RunConfig
from ft_dist.config.yaml_text import MAX_DEPTH, parse_yaml, read_yaml, reads_as_text
from ft_dist.errors import ConfigError, counted
from ft_dist.method.section import check_text
from ft_dist.method.table import DEFAULT, METHODS

MAX_PROBLEMS = 5
"""How many problems of a config one message names"""


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and validate. `recipe` is a path, or the name of a shipped recipe such as `smoke`.

    Raises ConfigError naming the key, the rule and the fix.
    """
    path = find_recipe(recipe)
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: contains {type(tree).__name__}, but a config is a mapping of sections.")
    for override in overrides:
        apply_override(tree, override)
    config = validate(tree)
    for source in (*config.data.train, *config.data.eval):
        source.path = _data_path(source.path, config_file=path)
    return config


def _data_path(name: str, *, config_file: Path) -> str:
    """Resolve a relative path from the working directory or, if it does not exist there, from the config file's folder,
    so that a recipe shipped with its data works from anywhere."""
    from_config = config_file.resolve().parent / name
    # a glob with the folder of the config in front may be too long for a path
    with contextlib.suppress(OSError):
        if not Path(name).exists() and from_config.exists():
            return str(from_config)
    return name


def find_recipe(recipe: str) -> Path:
    try:
        path = Path(recipe)
        if path.is_file():
            return path
    except (OSError, ValueError) as error:  # too long for a path; NUL
        raise ConfigError(f"{ascii(recipe)[:80]}: not the path of a config ({error.args[-1]}).") from None
    shipped = recipe_folder()
    named = shipped / (recipe if recipe.endswith(".yaml") else f"{recipe}.yaml")
    if path.name == recipe and named.is_file():
        return named
    names = sorted(file.stem for file in shipped.glob("*.yaml"))
    near = difflib.get_close_matches(path.stem.lower(), names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{recipe}: no such config file, and no shipped recipe of that name ({', '.join(names)}).{hint}")


def recipe_folder() -> Path:
    """The shipped recipes."""
    return shipped_folder("configs", holding="*.yaml")


def shipped_folder(name: str, *, holding: str) -> Path:
    """`ft_dist/NAME` as the wheel installs it, if it has files that match `holding`, otherwise NAME/ of the source
    tree."""
    package = Path(__file__).resolve().parents[1]
    packaged = (package / name).resolve()
    return packaged if any(packaged.glob(holding)) else package.parent / name


def validate(tree: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def config_tree(config: RunConfig) -> dict[str, Any]:
    """All values, also defaults; but optim.epochs only if it is set, since null has another meaning on a resume."""
    tree = config.model_dump(mode="json")
    if "epochs" not in config.optim.model_fields_set:
        del tree["optim"]["epochs"]
    return tree


def dump_config(config: RunConfig) -> str:
    """`config_tree` as YAML."""
    return yaml.dump(config_tree(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))


class _Dumper(yaml.SafeDumper):
    """Every value on one line, so that none can look like another line of a script that embeds the config."""


def _on_one_line(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    quoted = "\n" in text or not reads_as_text(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _on_one_line)


def json_schema() -> str:
    schema = RunConfig.model_json_schema()
    for kind, method in METHODS.items():
        if method is not DEFAULT:  # otherwise a section without `kind` would be valid for several methods
            section = schema["$defs"][method.__name__]
            del section["properties"]["kind"]["default"]
            section["required"] = ["kind"]
        assert schema["$defs"][method.__name__]["properties"]["kind"]["const"] == kind
    return json.dumps(schema, indent=2)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` in an unvalidated tree. Raises ConfigError."""
    key, separator, text = override.partition("=")
    *parents, leaf = names = key.split(".")
    shown = _start(repr(override))
    if not separator or not all(name.isprintable() and name.strip() for name in names):
        raise ConfigError(f"override {shown} must have the form key.sub=value.")
    if len(names) > MAX_DEPTH:
        raise ConfigError(f"override {shown}: no key has {len(names)} parts.")
    try:
        check_text(text)
    except ValueError as error:
        raise ConfigError(f"override {shown}: its value {error}.") from None
    try:
        value = parse_yaml(text, where=f"override {shown}")
    except yaml.YAMLError:
        value = text
    node: Any = tree
    for depth, name in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        node = _child(node, name, where)
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {shown}: {where} is a value, not a section.")
    if isinstance(node, list):
        node[_index(node, leaf, key)] = value
    else:
        node[leaf] = value


def _child(node: Any, name: str, where: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, name, where)]
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _index(node: list[Any], name: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", name) or int(name) >= len(node):
        raise ConfigError(f"{_start(where)}: the list has {len(node)} entries, numbered from 0.")
    return int(name)


def _explain(error: ValidationError) -> str:
    """The problems in one line: key, value and rule. Unknown keys come first, with the nearest valid one: a required
    key that is misspelt is missing too."""
    lines: list[str] = []
    suggested: set[str | None] = set()
    rules: dict[str, int] = {}  # the place in `lines` of a value and its rule
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    for problem in problems[:MAX_PROBLEMS]:
        location = [str(part) for part in problem["loc"]]
        if location[:1] == ["method"] and location[1:2] and location[1] in METHODS:
            del location[1]  # pydantic names the member of the union too
        key = _without_members(location)
        if problem["type"] == "extra_forbidden":
            near = _nearest(location)
            suggested.add(near)
            hint = f" Did you mean {near}?" if near else ""
            lines.append(f"{key}: unknown key.{hint}")
        elif problem["type"] == "union_tag_invalid":
            lines.append(f"{key}.kind={_short(problem['input']['kind'])}: should be {' or '.join(map(repr, METHODS))}.")
        elif problem["type"] in ("model_type", "model_attributes_type"):
            lines.append(f"{key}={_short(problem['input'])}: should be a section, such as {key}: {{key: value}}.")
        elif problem["type"] == "missing":
            if key not in suggested:
                lines.append(f"{key}: required, but not given. Add it to the config, or pass {key}=VALUE.")
        else:
            rule = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            rule = rule.partition(", unable to")[0]  # parse or interpret the value, which the message shows
            value = f"{key}={_short(problem['input'])}"
            if problem["type"] == "value_error":
                lines.append(f"{key}: {rule}." if key else f"{rule}.")
            elif value in rules:  # another member of the union
                lines[rules[value]] = f"{lines[rules[value]][:-1]} or {rule}."
            else:
                rules[value] = len(lines)
                lines.append(f"{value}: should be {rule}.")
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"And {counted(len(problems) - MAX_PROBLEMS, 'more problem')}.")
    return " ".join(dict.fromkeys(lines))


def _without_members(location: list[str]) -> str:
    """The key of a problem, whose location also names the member of a union that was tried (`data.packing.bool`)."""
    unions = {path for path, _, members in _fields(RunConfig) if len(members) > 1}
    kept: list[str] = []
    for part in location:
        section = ".".join(name for name in kept if not name.isdigit())
        if section not in unions or part.isdigit():
            kept.append(part)
    return ".".join(kept)


def _short(value: object) -> str:
    return _start(json.dumps(value, default=str, ensure_ascii=not isinstance(value, str) or not value.isprintable()))


def _start(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(location: list[str]) -> str | None:
    """The valid key closest to an unknown one: in the same section, by another trainer's name, or anywhere."""
    # list indices are part of the location but not of the schema
    section = ".".join(part for part in location[:-1] if not part.isdigit())
    everywhere = {name: path for path, name in reversed(list(_keys(RunConfig)))}
    siblings = {name: path for path, name in _keys(RunConfig) if path.rpartition(".")[0] == section}
    for paths, cutoff in ((siblings, 0.6), (PEER_NAMES, 0.85), (everywhere, 0.6)):
        close = difflib.get_close_matches(location[-1].lower(), paths, n=1, cutoff=cutoff)
        if close:
            return paths[close[0]]
    return None


def _keys(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    yield from ((path, name) for path, name, _ in _fields(model))


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, list[Any]]]:
    """Path and name of every key, and the members of its union, as far as they are values other than None."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        union = get_origin(field.annotation) in (Union, UnionType)
        members = [*get_args(field.annotation)] if union else [field.annotation]
        sections = [part for part in (*members, *get_args(field.annotation)) if _is_section(part)]
        yield path, name, [member for member in members if member is not NoneType and not sections]
        for section in dict.fromkeys(sections):
            yield from _fields(section, f"{path}.")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
