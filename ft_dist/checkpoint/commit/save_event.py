"""The outcome of a background save or copy, for the run to record."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SaveEvent:
    """An event for events.jsonl with its fields, and a line for the console if the user should see one."""

    name: str
    step: int
    fields: dict[str, Any] = field(default_factory=dict)
    note: str | None = None
