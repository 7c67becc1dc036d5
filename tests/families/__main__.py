"""`python -m tests.families [ARCHITECTURE ...]`: a table of every architecture, each with LoRA and full fine-tuning.

Exits with 1 if a row is wrong. A refusal is right if `ft-dist check --model` and `ft-dist train` agree on it.
"""

import json
import os
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import deepspeed  # noqa: F401 - workers are forked and inherit imports
import peft  # noqa: F401

import ft_dist.run.proof.check_model
import ft_dist.run.start  # noqa: F401
from tests.families.architectures import ARCHITECTURES
from tests.families.row import METHODS, Row, rows_of

WORKERS = 2
WIDTHS = (24, 6, 10, 20, 88, 0)


def main(arguments: list[str]) -> int:
    names = [name for name in arguments if not name.startswith("--")] or list(ARCHITECTURES)
    started = time.perf_counter()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FT_DIST_CACHE"] = folder
        pool = get_context("fork").Pool(WORKERS, maxtasksperchild=1)
        jobs = [pool.apply_async(rows_of, (name, Path(folder) / name, list(METHODS))) for name in names]
        print(_columns("architecture", "method", "rows", "largest difference", "trained", "result"))
        for job in jobs:
            for row in job.get():
                rows.append(row)
                print(_line(row), flush=True)
                if "--notes" in arguments:
                    print("\n".join(f"    {note}" for note in row.notes), flush=True)
    wrong = [row for row in rows if not row.right]
    refused = [row for row in rows if row.right and row.refusal]
    print(
        f"{len(names)} architectures, {len(rows)} rows: {len(rows) - len(wrong) - len(refused)} right, "
        f"{len(refused)} refused, {len(wrong)} wrong; {time.perf_counter() - started:.0f} s"
    )
    for argument in arguments:
        if argument.startswith("--json="):
            Path(argument.removeprefix("--json=")).write_text(json.dumps([vars(row) for row in rows], indent=1))
    return 1 if wrong else 0


def _line(row: Row) -> str:
    largest = max(row.differences.values(), default=0.0)
    result = "; ".join(row.wrong) if row.wrong else f"refused: {row.refusal}" if row.refusal else row.warning or "right"
    difference = f"{largest:.1e}" if row.differences else "-"
    mark = "WRONG " if row.wrong else ""
    return _columns(row.model_type, row.method, row.separation, difference, row.trained, mark + result)


def _columns(*cells: str) -> str:
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
