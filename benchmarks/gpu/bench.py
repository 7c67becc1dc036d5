"""`ft-dist bench` as a stage: figures become rows as soon as the ranks have them, logs become the stage's output.

    python -m benchmarks.gpu.bench MODEL [arguments of ft-dist bench ...]

A setting that the product refuses (say FP8 on a chip without it) gives a `not_available` row, not a failure.
Standard library only.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.rows import NOT_AVAILABLE, STAGE, emit, tail

REFUSED = 2
"""Exit code of ft-dist for an error that the user can fix"""
POLL_S = 0.25


def main() -> int:
    arguments = sys.argv[1:]
    work = Path(os.environ.get("FT_DIST_WORK") or tempfile.mkdtemp())
    folder = work / f"bench-{os.environ.get(STAGE) or 'alone'}"
    signal.signal(signal.SIGTERM, _stop)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "ft_dist.cli",
        "bench",
        *arguments,
        "--nproc",
        "1",
        "--to",
        str(folder),
    ]
    errors = folder.with_suffix(".stderr")
    reported = False
    with errors.open("wb") as file:
        process = subprocess.Popen(command, stderr=file)
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                reported = reported or early(folder, arguments)
        finally:  # also when this stage is cut off: the ranks' logs are the evidence
            show_logs(folder)
    said = errors.read_text(encoding="utf-8", errors="replace")
    print(said, flush=True)
    if process.returncode == 0:
        report = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
        emit("bench", arguments=arguments, title=report["title"], **report["measurements"][0])
        return 0
    ran = (folder / "work" / "output.log").is_file()
    if process.returncode == REFUSED and not ran:
        emit("bench", arguments=arguments, not_available=tail(said))
        return NOT_AVAILABLE
    emit("bench", arguments=arguments, failed=tail(said), log=tail(output(folder)))
    return 1


def early(folder: Path, arguments: list[str]) -> bool:
    """Whether the timed steps are done; if so, emits their rates as a row at once."""
    try:
        seen = json.loads((folder / "work" / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    steps = seen["records"][2:]
    spans = [step["step_s"] + step["data_wait_s"] for step in steps]
    rates = [step["real_tokens"] / span for step, span in zip(steps, spans, strict=True)]
    emit(
        "bench timed",
        arguments=arguments,
        step_s=statistics.median(spans),
        real_tokens_per_s=statistics.median(rates),
        peak_bytes=seen["peak_bytes"],
        steps=[
            {key: step.get(key) for key in ("step", "loss", "step_s", "data_wait_s", "real_tokens")} for step in steps
        ],
    )
    return True


def output(folder: Path) -> str:
    path = folder / "work" / "output.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def show_logs(folder: Path) -> None:
    """Print the ranks' logs and each step's record."""
    run = folder / "work" / "run"
    others = [path for path in sorted(run.glob("logs/*.log")) if path.name != "rank-0.log"]  # rank 0 is in output.log
    for path in [folder / "work" / "output.log", *others, run / "metrics.jsonl", run / "events.jsonl"]:
        if path.is_file():
            print(f"-- {path.name}\n{path.read_text(encoding='utf-8', errors='replace')}", flush=True)


def _stop(*_: Any) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
