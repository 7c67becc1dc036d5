"""Reads YAML that anybody may have written: a plain tree of bounded size, or one line that says where it is not.

Text is YAML 1.2 where 1.1 surprises: `2e-4` is a number, `off` and `2026-01-31` are text, `4:00:00` is not 14400.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from ft_dist.errors import ConfigError
from ft_dist.method.section import check_text

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_VALUES = 50_000
"""In the whole tree, an alias counting as much as what it stands for"""

_MERGE = "tag:yaml.org,2002:merge"
_REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "timestamp")}


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, too deep nesting, and aliases that grow beyond MAX_VALUES."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"a second {key.value!r}", problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def flatten_mapping(self, node: Any) -> None:
        """Older versions of PyYAML repeat a key for every merge that brings it."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES} keys", problem_mark=node.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = list("-+.0123456789")
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][\d_]*|0b[01_]+|0x[\da-fA-F_]+)", _NUMBER),
    (
        "float",
        r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        _NUMBER,
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$", re.ASCII), _first)


def read_yaml(path: Path) -> Any:
    """The tree in the file `path`. Raises ConfigError naming line and column."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path}: more than {MAX_BYTES:,} bytes, which is too much for a config.")
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        return parse_yaml(text, where=str(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{path}{where}: not valid YAML ({problem[:200]}).") from None


def parse_yaml(text: str, *, where: str) -> Any:
    """Mappings with text as keys, lists, text, numbers, booleans and null. Raises yaml.YAMLError, or ConfigError for
    YAML that is valid but no config."""
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML (nested too deeply).") from None
    except yaml.YAMLError:
        raise
    except (ValueError, LookupError, TypeError) as error:  # a number of thousands of digits, an odd `!!tag`
        raise ConfigError(f"{where}: not valid YAML ({' '.join(str(error).split())[:200]}).") from None
    _check_tree(tree, where)
    return tree


def reads_as_text(text: str) -> bool:
    """Whether unquoted `text` stays text; PyYAML's own dumper leaves 1e5 unquoted, which we read as a number."""
    return str(_Loader("").resolve(yaml.ScalarNode, text, (True, False))) == "tag:yaml.org,2002:str"


def _check_tree(tree: Any, where: str) -> None:
    """Each level by itself, so that neither an alias inside itself nor aliases of aliases are ever followed far."""
    level, values = [tree], 0
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                for key in node:
                    _check_key(key, where)
                below += node.values()
            elif isinstance(node, list):
                below += node
            elif isinstance(node, int) and node.bit_length() > 64:  # too long to print, if it is hexadecimal
                raise ConfigError(f"{where}: an integer of {node.bit_length():,} bits, which no key takes.")
            elif node is not None and not isinstance(node, str | int | float):
                raise ConfigError(f"{where}: a {type(node).__name__}, where only text and numbers can be used.")
            if len(below) > MAX_VALUES - values:
                raise ConfigError(f"{where}: more than {MAX_VALUES:,} values, counting what aliases stand for.")
        if not below:
            return
        level, values = below, values + len(below)
    raise ConfigError(f"{where}: more than {MAX_DEPTH} levels, or an alias inside itself.")


def _check_key(key: Any, where: str) -> None:
    if not isinstance(key, str):
        raise ConfigError(f"{where}: the key {ascii(key)[:80]} is not text. Put it in quotes.")
    try:
        check_text(key)
    except ValueError as problem:
        raise ConfigError(f"{where}: the key {ascii(key)[:80]} {problem}.") from None
