"""Rows of results that survive a crash: each is written to disk as soon as it is known.

A benchmark calls `emit` for every figure. If `FT_DIST_ROWS` names a file, the row is appended there; otherwise
nothing happens. Standard library only, so it works where nothing else does.
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
"""Exit code of a benchmark that cannot run on this machine; a row gives the reason"""
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
    """One write per line, then fsync: rows of several processes do not mix, and a kill loses none of them."""
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
    """Turns an exception inside into a row with `failed` and its traceback, and lets the program continue. The list
    gets one line per exception."""
    problems: list[str] = []
    try:
        yield problems
    except Exception as problem:  # always continue with the next figure
        trace = "".join(traceback.format_exception(problem))
        problems.append(f"{type(problem).__name__}: {problem}"[:500])
        print(trace, flush=True)
        emit(kind, **fields, failed=problems[0], traceback=tail(trace))


def tail(text: str) -> str:
    """The last non-empty lines."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-TAIL_LINES:])[-TAIL_CHARACTERS:]
