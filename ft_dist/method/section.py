"""What every section of the config and of a profile refuses, whatever its keys mean, and the types of their paths."""

import os
import unicodedata
from functools import cache
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from ft_dist.outside import MAX_PART_BYTES

MAX_INTEGER = 2**63 - 1
MAX_TEXT = 100_000
MAX_PATH_BYTES = 3_800
"""Linux allows 4,095 with the names of our own files"""


class Section(BaseModel):
    """Unknown keys are errors, numbers are finite and fit 64 bits, and text is one line of printable characters."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    several_lines: ClassVar[tuple[str, ...]] = ()
    """Keys whose text may have line breaks"""

    @model_validator(mode="before")
    @classmethod
    def _no_number_from_a_boolean(cls, section: object) -> object:
        for name, value in section.items() if isinstance(section, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and not _takes_a_boolean(cls, name):
                raise ValueError(f"{name}={str(value).lower()} is a boolean, which this key does not take")
        return section

    @field_validator("*", mode="after")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        breaks = "\n\t" if info.field_name in cls.several_lines else ""
        parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for part in parts:
            if isinstance(part, str):
                check_text(part, allowed=breaks)
            elif isinstance(part, int) and abs(part) > MAX_INTEGER:
                raise ValueError(f"an integer beyond {MAX_INTEGER}")
        return value


@cache
def _takes_a_boolean(section: type[Section], name: str) -> bool:
    annotations = [section.model_fields[name].annotation]
    while annotations and bool not in annotations:
        annotations = [part for annotation in annotations for part in get_args(annotation)]
    return bool in annotations


def check_text(text: str, *, allowed: str = "") -> None:
    """Raises ValueError for control characters, line breaks and half surrogates, but those `allowed`."""
    for at, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") and character not in allowed:
            raise ValueError(f"has the control character {character!a} at position {at}; remove it")
    if len(text) > MAX_TEXT:
        raise ValueError(f"has {len(text):,} characters, more than {MAX_TEXT:,}")


def _path(value: str) -> str:
    """Expands `~`. Raises ValueError for what no file system or object store can hold."""
    check_text(value)
    if not value.strip():
        raise ValueError("is empty; name a path")
    if "://" not in value:
        home = os.path.expanduser(value)
        if PurePath(home).parts[:1] and PurePath(home).parts[0].startswith("~"):
            raise ValueError(f"{_start(value)} names the home folder of a user whom this machine does not have")
        value = home
    if len(value.encode()) > MAX_PATH_BYTES:
        raise ValueError(f"{_start(value)} has {len(value.encode()):,} bytes, and a path at most {MAX_PATH_BYTES:,}")
    for part in value.split("/"):
        if len(part.encode()) > MAX_PART_BYTES:
            raise ValueError(f"{_start(part)} has {len(part.encode())} bytes, and a file name at most {MAX_PART_BYTES}")
    return value


def _no_url(value: str) -> str:
    if "://" in value:
        raise ValueError(
            f"{_start(value)} is a URL, but this is a path on this machine; checkpoint.path and data.train take URLs"
        )
    return value


def _start(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


LocalPath = Annotated[str, AfterValidator(_path), AfterValidator(_no_url)]
"""A file or folder of this machine; `~` is the user's home"""
Place = Annotated[str, AfterValidator(_path)]
"""A path of this machine, a URL, or a name that is looked up"""
