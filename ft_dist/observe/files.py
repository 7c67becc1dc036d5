"""The run folder's JSON lines: rank 0 appends and flushes line by line.

A resumed run first drops the lines of steps that were not committed, so that every step appears once.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

TAIL_BYTES = 64 * 1024


class JsonLines:
    """Append-only file; `keep_until` first drops the lines of later steps."""

    def __init__(self, path: Path, *, keep_until: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and keep_until is not None:
            _drop_after(path, keep_until)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class EventLog(JsonLines):
    """events.jsonl: start, resume, preempted, saved, evaluated, skipped, hung, end. The agent adds restarted, world."""

    def event(self, name: str, **fields: Any) -> None:
        self.write({"time": round(time.time(), 3), "event": name} | fields)


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
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                return record
    return None


def _drop_after(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            # a killed process left a partial line
            continue
        if record.get("step", 0) <= step:
            kept.append(line)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
