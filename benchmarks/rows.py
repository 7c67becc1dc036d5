"""Rows of results that survive a crash: each is on disk as soon as it is known.

A benchmark calls `emit` for every figure it has. With `FT_DIST_ROWS` set to a file the row is appended there; without
it nothing happens. Standard library only, so that it works where nothing else does.
"""

import contextlib
import json
import math
import os
import time
import traceback
from collections.abc import Iterator
from typing import Any

ROWS, STAGE, STARTED = "FT_DIST_ROWS", "FT_DIST_STAGE", "FT_DIST_STARTED"
NOT_AVAILABLE = 3
"""Exit code of a benchmark for which something is missing here: a row says what"""
TAIL_LINES, TAIL_CHARACTERS = 60, 8000


def emit(kind: str, **fields: Any) -> dict[str, Any]:
    """Append one line of JSON: {"stage", "at_s", "kind", ...}; NaN and infinities become null."""
    started = float(os.environ.get(STARTED, "nan"))
    at_s = round(time.time() - started, 2) if started == started else None
    row = {"stage": os.environ.get(STAGE), "at_s": at_s, "kind": kind, **fields}
    path = os.environ.get(ROWS)
    if path:
        append(path, row)
    return row


def append(path: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """One write of one line, then fsync: rows of several processes do not mix, and a kill loses none of them."""
    line = (json.dumps(finite(row), default=str) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def guarded(kind: str, **fields: Any) -> Iterator[list[str]]:
    """An exception inside becomes a row with `failed` and its traceback, and the program continues. The list then has
    one line about it."""
    problems: list[str] = []
    try:
        yield problems
    except Exception as problem:  # the point is to get to the next figure, whatever happened
        told = "".join(traceback.format_exception(problem))
        problems.append(f"{type(problem).__name__}: {problem}"[:500])
        print(told, flush=True)
        emit(kind, **fields, failed=problems[0], traceback=tail(told))


def tail(text: str) -> str:
    """The last lines that are not empty."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-TAIL_LINES:])[-TAIL_CHARACTERS:]
