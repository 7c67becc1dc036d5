"""What background saving has to tell."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """What became of a save: an event with its fields, and a line for whoever watches where it needs one."""

    event: str
    step: int
    fields: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"
