"""Render the templates in `launch/`. A missing variable is an error, and filters quote values for each kind of file."""

import json
import shlex
from pathlib import Path
from typing import Any

from ft_dist.config import shipped_folder


def template_folder() -> Path:
    """The folder of templates and shipped profiles."""
    return shipped_folder("launch", holding="*.j2")


def render(template: str, **values: Any) -> str:
    """The text of `launch/TEMPLATE` with `values`. `| sh` quotes a value for a shell, `| words` a list of them, and
    `| yaml` a value for a YAML file.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # noqa: S701 - not HTML: filters quote
        loader=FileSystemLoader(template_folder()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    environment.filters["words"] = shlex.join
    # JSON is YAML, and it distinguishes text from numbers
    environment.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.get_template(template).render(**values)
