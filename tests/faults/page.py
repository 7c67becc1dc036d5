"""Writes docs/explanation/faults.md from the result of the matrix, which lies next to it as JSON."""

import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.faults.kinds import KINDS
from tests.faults.kinds.kind import Kind

RESULT = ROOT / "docs/explanation/faults.json"
PAGE = RESULT.with_suffix(".md")
NOTE = "<!-- written by python -m tests.faults from faults.json; do not edit -->"
PHASES = ("start", "resume", "training", "commit", "mirror copy", "evaluate", "final")
INTRODUCTION = """
Each row is one kind of fault, injected into a real run of a tiny model: calls of the C library fail on chosen files,
and processes are killed or stopped at a chosen call or step. After the fault, the same command is started again if the
run has not finished. For every kind, all of this must hold, or `make faults-matrix` fails:

- Every commit stays intact until a newer one replaces it, and every start resumes from the newest one.
- The loss of each step and the final weights are bit for bit those of a run without the fault, and each step is
  recorded once.
- The exit code is that of the table, errors are one line without a traceback, and no process or temporary file is left.
"""


def write_result(rows: Iterable[Mapping[str, Any]], *, seconds: float, folder: Path = RESULT.parent) -> None:
    """`rows` are those of verdicts, as dictionaries."""
    content = {
        "python": platform.python_version(),
        "kinds": len(KINDS),
        "minutes": round(seconds / 60, 1),
        "rows": {row["name"]: {key: row[key] for key in ("codes", "said", "problems", "seconds")} for row in rows},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT.name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / PAGE.name).write_text(page(content), encoding="utf-8")


def rewrite(folder: Path = RESULT.parent) -> None:
    """The page from the result that is there."""
    result = json.loads((folder / RESULT.name).read_text(encoding="utf-8"))
    (folder / PAGE.name).write_text(page(result), encoding="utf-8")


def page(result: Mapping[str, Any]) -> str:
    """The page that belongs to a result."""
    rows = result["rows"]
    held = sum(not row["problems"] for row in rows.values())
    lines = [NOTE, "# Faults", INTRODUCTION, f"{held} of {len(rows)} kinds hold ({result['minutes']} minutes)."]
    for phase in PHASES:
        kinds = [kind for kind in KINDS.values() if kind.phase == phase and kind.name in rows]
        if kinds:
            lines += [
                "",
                f"## {phase.capitalize()}",
                "",
                "| fault | exit | what you do | the run says |",
                "|---|---|---|---|",
            ]
            lines += [_row(kind, rows[kind.name]) for kind in kinds]
    return "\n".join(lines) + "\n"


def _row(kind: Kind, row: Mapping[str, Any]) -> str:
    said = f"`{_cell(row['said'])}`" if row["said"] else ""
    broken = f"**{row['problems'][0][0]}** " if row["problems"] else ""
    return f"| {_cell(kind.what)} | {row['codes'][0] if row['codes'] else ''} | {kind.then} | {broken}{said} |"


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return line if len(line) <= 160 else f"{line[:157]}..."
