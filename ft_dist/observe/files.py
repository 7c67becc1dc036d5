"""The run folder's JSON lines: rank 0 appends line by line, and readers pass over what is damaged.

A resumed run first drops the lines of steps that were not committed, so that every step appears once.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ft_dist.errors import UserError, counted
from ft_dist.observe.patient import AppendedFile, replace
from ft_dist.outside import parse_object

TAIL_BYTES = 64 * 1024


class JsonLines(AppendedFile):
    """Append-only file; `keep_until` first drops the lines of later steps, and damaged ones, which `notes` reports."""

    def __init__(self, path: Path, *, keep_until: int | None = None) -> None:
        super().__init__(path, lines=True, before_opening=self._drop)
        self.notes: list[str] = []
        self._keep_until = keep_until
        self.open()

    def write(self, record: dict[str, Any]) -> None:
        self.write_bytes(json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n")

    def _drop(self, path: Path) -> None:
        if self._keep_until is not None and path.exists():
            damaged = drop_after(path, self._keep_until)
            if damaged:
                self.notes.append(f"{path}: {counted(damaged, 'damaged line')} dropped")


class EventLog(JsonLines):
    """events.jsonl: start, resume, preempted, saved, evaluated, skipped, hung, end. The agent adds restarted, world."""

    def event(self, name: str, **fields: Any) -> None:
        self.write(event_record(name, fields))


def event_record(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"time": round(time.time(), 3), "event": name} | fields


def tail(path: Path) -> list[str]:
    """The lines in the last TAIL_BYTES of a file, the first perhaps truncated; empty if there is no file."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - TAIL_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()
    return []


def last_record(path: Path) -> dict[str, Any] | None:
    """The last complete line of a JSON lines file: a killed process may have left a partial line."""
    for line in reversed(tail(path)):
        record = parse_line(line)
        if record is not None:
            return record
    return None


def last_step(path: Path) -> int:
    """The step of the last line that has one, or 0."""
    for line in reversed(tail(path)):
        record = parse_line(line)
        step = step_of(record) if record else None
        if step:
            return step
    return 0


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Every line that is a JSON object; others, which a full disk or a kill left, are passed over. Raises OSError."""
    with path.open("rb") as file:
        for line in file:
            record = parse_line(line)
            if record is not None:
                yield record


def parse_line(line: bytes | str) -> dict[str, Any] | None:
    """None for anything but one JSON object."""
    with suppress(UserError):
        return parse_object(line, where="", error=UserError)
    return None


def step_of(record: dict[str, Any]) -> int | None:
    """Its step, 0 without one; None if that is no number of a step."""
    step = record.get("step", 0)
    return step if type(step) is int and step >= 0 else None


def drop_after(path: Path, step: int) -> int:
    """Drop the lines of steps after `step`, and damaged ones; returns how many were damaged. Raises OSError.

    Usually they are the end of the file, which is cut off: that works on a full disk too. Else a new file replaces it.
    A partial last line, which every killed process may leave, does not count as damaged.
    """
    damaged = keeps_to = at = 0
    in_between = False
    for line, kept, broken in _judged(path, step):
        damaged += broken
        if kept and at == keeps_to:
            keeps_to += len(line)
        elif kept:
            in_between = True
        at += len(line)
    if in_between:
        lines = (line for line, kept, _ in _judged(path, step) if kept)
        replace(path, b"".join(line.rstrip(b"\n") + b"\n" for line in lines))
    elif keeps_to < at:
        os.truncate(path, keeps_to)
    return damaged


def _judged(path: Path, step: int) -> Iterator[tuple[bytes, bool, bool]]:
    """Every line, whether to keep it, and whether it is damaged."""
    with path.open("rb") as file:
        for line in file:
            record = parse_line(line)
            found = step_of(record) if record is not None else None
            yield line, found is not None and found <= step, found is None and line.endswith(b"\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace the file, durably. Raises OSError."""
    replace(path, json_text(content).encode(errors="replace"))


def json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
