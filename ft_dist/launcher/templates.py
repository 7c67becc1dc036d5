"""Render the templates in `launch/`. A missing variable is an error, and filters quote values for each kind of file."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from ft_dist.config import shipped_folder


def template_folder() -> Path:
    """The folder of templates and shipped profiles."""
    return shipped_folder("launch", holding="*.j2")


def render(template: str, **values: Any) -> str:
    """The text of `launch/TEMPLATE` with `values`. `| sh` quotes a value for a shell, `| words` a list of them,
    `| yaml` a value for a YAML file, and `| sbatch` one for an `#SBATCH` line; `| pod` keeps Kubernetes from replacing
    `$(NAME)` in text. Values have no control characters, except for line breaks in `sky.setup`.
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
    environment.filters["sbatch"] = _sbatch
    environment.filters["pod"] = lambda text: re.sub(r"\$(?=[$(])", "$$", text)
    return environment.get_template(template).render(**values)


def _sbatch(value: object) -> str:
    """sbatch splits its lines itself: at spaces outside quotes, `#` begins a comment, and a backslash escapes in both
    kinds of quotes."""
    text = str(value)
    if re.fullmatch(r"[\w@%+=:,./-]+", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
