"""Run measurements one after the other in separate processes: one, a sweep of settings, or several world sizes."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ft_dist.bench.figures import communication_share, figures
from ft_dist.bench.spec import Spec
from ft_dist.errors import EXIT_PREEMPTED, MemoryPlanError, Preempted, UserError
from ft_dist.launcher.agent import run_here
from ft_dist.launcher.machine import launched
from ft_dist.outside import parse_object
from ft_dist.plan.guard import check_fits_here

SWEPT: dict[str, list[Any]] = {
    "batch.micro_rows": [1, 2, 4],
    "engine.activation_checkpointing": [False, True],
    "engine.zero_stage": [0, 2, 3],
    "model.kernels": ["auto", "off"],
}
FAILED = "failed"
LOG = "output.log"
"""Output of all ranks of a measurement"""
Say = Callable[[str], None]


def measure_once(spec: Spec, *, nproc: int) -> dict[str, Any]:
    """Run the measurement on `nproc` ranks of this machine, or as this rank of a launcher's world.

    Each record is written (record.json, next to the log) before the next measurement starts. Raises UserError, and
    Preempted if a signal ended it. Ranks of a launcher's world other than 0 get an empty record.
    """
    refuse_without_memory(spec, nproc=nproc)
    folder = Path(spec.result).parent
    folder.mkdir(parents=True, exist_ok=True)
    if launched():
        from ft_dist.bench.rank import measure

        seen = measure(spec)
        return figures(spec, seen) if seen["records"] else {}
    written = spec.write(folder / "spec.json")
    with _output_redirected(folder / LOG):
        code = run_here([str(written)], spec.config(), nproc=nproc, max_restarts=0, module="ft_dist.bench.rank")
    if code == EXIT_PREEMPTED:
        raise Preempted("a signal ended the measurement")
    result = Path(spec.result)
    if code != 0 or not result.is_file():
        log = folder / LOG
        raise UserError(f"the measurement failed (exit code {code}; its output: {log}): {_last_line(log)}")
    record = figures(spec, parse_object(result.read_bytes(), where=result, error=UserError))
    (folder / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def refuse_without_memory(spec: Spec, *, nproc: int) -> None:
    """Raises MemoryPlanError unless the measurement is forced: random weights alone may exceed the memory."""
    if not spec.force:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", nproc)) if launched() else nproc
        check_fits_here(spec.config(), ranks=nproc, ranks_per_node=here)


def sweep(spec: Spec, swept: dict[str, list[Any]], *, nproc: int, folder: Path, say: Say) -> list[dict[str, Any]]:
    """Every combination of the settings, fastest first; those that do not fit or fail are listed with the reason."""
    if launched():
        raise UserError("--sweep starts its own ranks for each setting. Run it without torchrun or srun.")
    found: list[dict[str, Any]] = []
    for number, values in enumerate(itertools.product(*swept.values())):
        settings = dict(zip(swept, values, strict=True))
        one = spec.changed(settings, folder / f"sweep-{number}")
        rows = one.tree["batch"]
        if rows["micro_rows"] * nproc > rows["global_rows"]:
            continue
        try:
            record = measure_once(one, nproc=nproc)
            rate, peak = record["real_tokens_per_s"], record["peak_bytes"] / 2**20
            say(f"  {settings_line(settings)}: {rate:,.0f} tokens/s, {peak:,.0f} MiB")
        except UserError as error:
            why = error.short if isinstance(error, MemoryPlanError) else str(error)
            record = {**settings, FAILED: why}
            say(f"  {settings_line(settings)}: {why}")
        found.append(record)
    return sorted(found, key=lambda record: -record.get("real_tokens_per_s", 0.0))


def scale(spec: Spec, worlds: Sequence[int], *, weak: bool, folder: Path, say: Say) -> list[dict[str, Any]]:
    """The same work on increasing world sizes: `weak` keeps the rows per rank, otherwise the rows per step.

    `efficiency` is the rate relative to the smallest world's rate scaled up linearly.
    """
    if launched():
        raise UserError("--scaling starts its own ranks. Under torchrun or srun, run plain bench once per world size.")
    found: list[dict[str, Any]] = []
    rows = spec.tree["batch"]["global_rows"]
    planned = []
    for world in worlds:
        settings = {"batch.global_rows": rows * world if weak else rows}
        if not weak and rows < world:
            raise UserError(
                f"--scaling strong splits {rows} rows over {world} ranks. Set batch.global_rows to at least {world}."
            )
        settings["batch.micro_rows"] = min(spec.tree["batch"]["micro_rows"], -(-settings["batch.global_rows"] // world))
        planned.append(spec.changed(settings, folder / f"world-{world}"))
        refuse_without_memory(planned[-1], nproc=world)
    for world, one in zip(worlds, planned, strict=True):
        record = measure_once(one, nproc=world)
        found.append(record)
        first = found[0]
        ideal = first["real_tokens_per_s"] * world / first["world_size"]
        record["efficiency"] = record["real_tokens_per_s"] / ideal
        record["communication_share"] = communication_share(record)
        say(
            f"  {world} ranks: {record['real_tokens_per_s']:,.0f} tokens/s, efficiency {record['efficiency']:.2f}, "
            f"communication {record['communication_share']:.0%} of a step"
        )
    return found


def fastest(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The record with the highest rate among those that ran."""
    ran = [record for record in records if FAILED not in record]
    return max(ran, key=lambda record: float(record["real_tokens_per_s"])) if ran else None


def settings_line(settings: dict[str, Any]) -> str:
    return " ".join(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in settings.items())


@contextlib.contextmanager
def _output_redirected(log: Path) -> Iterator[None]:
    """Redirect the ranks' output to `log`, so that only the report is on the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["no output"])[-1].strip()
