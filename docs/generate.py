"""`python docs/generate.py`: write docs/reference/cli.md and config.md from the code.

The commands come from the signatures of the verbs, the keys from the JSON schema of the config. `--check` writes
nothing and exits with 1 if a page is stale.
"""

import inspect
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo, ParameterInfo

from ft_dist.cli.app import app
from ft_dist.config import json_schema

REFERENCE = Path(__file__).resolve().parent / "reference"
NOTE = "<!-- written by python docs/generate.py; do not edit -->"
Schema = dict[str, Any]


def main() -> int:
    stale = [name for name, text in pages().items() if _read(REFERENCE / name) != text]
    if "--check" in sys.argv[1:]:
        print("\n".join(f"docs/reference/{name} is stale: run python docs/generate.py" for name in stale), end="")
        return int(bool(stale))
    for name in stale:
        (REFERENCE / name).write_text(pages()[name], encoding="utf-8")
    return 0


def pages() -> dict[str, str]:
    """File name -> text."""
    return {"cli.md": cli_page(), "config.md": config_page()}


def cli_page() -> str:
    lines = [NOTE, "# Commands", "", "`KEY.SUB=VALUE` overrides [a config key](config.md)."]
    lines += ["[The run folder](run-folder.md#exit-codes) lists the exit codes."]
    for name, callback in _verbs(app, "ft-dist"):
        lines += ["", *_verb(name, callback)]
    return "\n".join(lines) + "\n"


def _verbs(group: typer.Typer, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every command of `group` and of the groups inside it, with its full name."""
    for command in group.registered_commands:
        assert command.callback
        yield f"{prefix} {command.name or command.callback.__name__.replace('_', '-')}", command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance
        yield from _verbs(inner.typer_instance, f"{prefix} {inner.name}")


def _verb(name: str, callback: Any) -> list[str]:
    hints = get_type_hints(callback, include_extras=True)
    signature = inspect.signature(callback).parameters.values()
    parameters = [(parameter, *_annotation(hints[parameter.name])) for parameter in signature]
    usage, rows = [name], []
    for parameter, kind, info in parameters:
        required = parameter.default is inspect.Parameter.empty
        if isinstance(info, OptionInfo):
            label = _option(parameter.name, kind, info)
        else:
            label = info.metavar or parameter.name.upper()
            usage.append(label if required or label.startswith("[") else f"[{label}]")
        default = "" if required else _default(parameter.default)
        rows.append(f"| `{_cell(label)}` | {_cell(info.help or '')} | {default} |")
    text = inspect.cleandoc(callback.__doc__ or "")
    usage += ["[OPTIONS]"] if any(isinstance(info, OptionInfo) for _, _, info in parameters) else []
    lines = [f"## {name}", "", text, "", "```", " ".join(usage), "```"]
    return [*lines, "", "| | | default |", "|---|---|---|", *rows] if rows else lines


def _annotation(hint: Any) -> tuple[Any, ParameterInfo]:
    assert get_origin(hint) is Annotated, hint
    kind, info = get_args(hint)[:2]
    assert isinstance(info, ParameterInfo)
    return kind, info


def _option(name: str, kind: Any, info: OptionInfo) -> str:
    # inside Annotated, typer keeps the first declaration as `default`
    declared = [word for word in (info.default, *(info.param_decls or ())) if str(word).startswith("--")]
    flag = declared[0] if declared else f"--{name.replace('_', '-')}"
    if kind is bool:
        return flag if declared else f"{flag}, --no-{name.replace('_', '-')}"
    return f"{flag} {info.metavar or _type(kind)}"


def _type(kind: Any) -> str:
    """As a placeholder: a|b, N, X, PATH or TEXT."""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType, list):
        return _type(next(one for one in get_args(kind) if one is not types.NoneType))
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _default(value: object) -> str:
    return "" if value is None or value is False else f"`{'on' if value is True else value}`"


def config_page() -> str:
    schema = json.loads(json_schema())
    lines = [NOTE, "# Config", "", f"{schema['description'].strip()} `ft-dist schema` prints the same as JSON schema."]
    lines += ["A key marked *required* has no default."]
    plain: Schema = {"required": schema.get("required", []), "properties": {}}
    for name, field in schema["properties"].items():
        sections = _sections(field, schema)
        for section in sections:
            title = name if len(sections) == 1 else f"{name}, kind: {section['properties']['kind']['const']}"
            lines += ["", f"## {title}", "", section.get("description", ""), "", *_keys(name, section, schema)]
        if not sections:
            plain["properties"][name] = field
    lines += ["", "## Top level", "", *_keys("", plain, schema)]
    for name in _used_by_items(schema):
        section = schema["$defs"][name]
        title = name.removesuffix("Config").lower()
        lines += ["", f"## {title} (an item of a list)", "", section.get("description", "")]
        lines += ["", *_keys("", section, schema)]
    return "\n".join(lines) + "\n"


def _sections(field: Schema, schema: Schema) -> list[Schema]:
    """The definitions that `field` refers to: one, or one per kind, or none for a plain value."""
    return [schema["$defs"][one["$ref"].rpartition("/")[2]] for one in _variants(field) if "$ref" in one]


def _variants(field: Schema) -> list[Schema]:
    return next((field[key] for key in ("oneOf", "anyOf", "allOf") if key in field), [field])


def _keys(prefix: str, section: Schema, schema: Schema) -> list[str]:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key, field in section["properties"].items():
        name = f"{prefix}.{key}" if prefix else key
        required = key in section.get("required", [])
        empty = {"array": [], "object": {}}.get(field.get("type", ""))
        default = "*required*" if required else f"`{json.dumps(field.get('default', empty), ensure_ascii=False)}`"
        description = _cell(field.get("description", ""))
        rows.append(f"| `{name}` | {_cell(_value(field))} | {default} | {description} |")
    return rows


def _value(field: Schema) -> str:
    """The type of a key, with its bounds."""
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2].removesuffix("Config").lower()
    if any(key in field for key in ("oneOf", "anyOf", "allOf")):
        return " or ".join(dict.fromkeys(_value(one) for one in _variants(field)))
    if field.get("type") == "array":
        return f"list of {_value(field.get('items', {}))}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]}" for key, sign in bounds.items() if key in field]
    return " ".join([field.get("type", "any"), *limits])


def _used_by_items(schema: Schema) -> list[str]:
    """Definitions that lists hold, such as a data source."""
    text = json.dumps(schema)
    return [name for name in schema["$defs"] if f'"items": {{"$ref": "#/$defs/{name}"}}' in text]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
