"""What comes from outside this process: JSON that we read back, and file names inside it.

Files may be torn by a full disk, written by another version, or made by somebody who wants to harm the reader. So
every JSON document has a schema, and every name of a file is checked before it is joined to a folder. Both fail with
one line that names the place, the value, and the rule.
"""

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ft_dist.errors import UserError

MAX_PART_BYTES = 255
"""Longest name of one file or folder on Linux file systems"""


class Document(BaseModel):
    """Base of the schemas. Keys of newer versions are ignored; values keep their JSON types; numbers are finite."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


Schema = TypeVar("Schema", bound=Document)


def parse_json(text: bytes | str, *, where: object, error: type[UserError]) -> Any:
    """Raises `error` for anything but one JSON value: cut UTF-8, too deep nesting, integers of thousands of digits."""
    try:
        return json.loads(text)
    except RecursionError:
        raise error(f"{where}: nested too deeply to be read as JSON.") from None
    except ValueError as problem:  # invalid JSON, invalid UTF-8, an integer beyond Python's limit
        raise error(f"{where}: not readable as JSON ({one_line(problem)}).") from None


def parse_object(text: bytes | str, *, where: object, error: type[UserError]) -> dict[str, Any]:
    """Raises `error` unless the text is one JSON object."""
    tree = parse_json(text, where=where, error=error)
    if not isinstance(tree, dict):
        raise error(f"{where}: contains {type(tree).__name__}, not a JSON object.")
    return tree


def parse_document(text: bytes | str, schema: type[Schema], *, where: object, error: type[UserError]) -> Schema:
    """Raises `error`, which names the first key that is missing or wrong."""
    return validated(parse_object(text, where=where, error=error), schema, where=where, error=error)


def validated(tree: dict[str, Any], schema: type[Schema], *, where: object, error: type[UserError]) -> Schema:
    """Raises `error`, which names the first key that is missing or wrong."""
    try:
        # by JSON's rules, in which a key that stands for a number is a string
        return schema.model_validate_json(json.dumps(tree))
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        key = one_line(".".join(str(part) for part in first["loc"]))
        raise error(f"{where}: {key or 'its content'}: {one_line(first['msg'])}.") from None
    except RecursionError:
        raise error(f"{where}: nested too deeply to be read as JSON.") from None


def check_name(name: object, *, where: object, error: type[UserError]) -> str:
    """The relative path `name`, as `a/b`, if it stays below the folder that it is joined to.

    Raises `error` for an absolute path, `..`, an empty part, control characters or a name too long for a file system.
    Symbolic links inside the folder are the business of whoever may write there.
    """
    parts = name.split("/") if isinstance(name, str) else []
    fits = all(part not in ("", ".", "..") and len(part.encode(errors="replace")) <= MAX_PART_BYTES for part in parts)
    if not isinstance(name, str) or not parts or not fits or not name.isprintable() or "\\" in name:
        raise error(
            f"{where}: names the file {_shown(name)}, which is not a plain path below its own folder. Do not use it."
        )
    return name


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(problem: object, *, most: int = 200) -> str:
    """The text of an error of a library, which may repeat what it has read: one line of printable characters."""
    text = "".join(sign if sign.isprintable() else " " for sign in str(problem))
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
