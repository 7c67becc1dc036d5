"""`ft-dist bench`: one measurement, a sweep or a series of world sizes, as one report."""

import contextlib
import datetime
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ft_dist.bench import measure
from ft_dist.bench.figures import FORMULA
from ft_dist.bench.measure import LOG, SWEPT, measure_once, scale
from ft_dist.bench.spec import make_spec
from ft_dist.errors import UserError
from ft_dist.launcher.machine import default_nproc, launched


def bench(
    model: str,
    overrides: Sequence[str],
    *,
    data: str = "synthetic",
    method: str = "lora",
    length: int = 1024,
    rows: int = 2,
    lengths: str = "full",
    labelled: float = 1.0,
    steps: int = 5,
    checkpoint: bool = True,
    force: bool = False,
    nproc: int | None = None,
    sweep: bool = False,
    scaling: str | None = None,
    work: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure and return {kind, title, date, machine, formula, measurements}. Raises UserError.

    `work` is a folder for the ranks' files; it is emptied first, and logs and figures stay there. Without it they are
    kept only if the measurement fails; the error says where. Inside torchrun or srun every rank calls this; `work` must
    then be a folder that all ranks see (required on several nodes), and ranks other than 0 report no measurements.
    """
    if sweep and scaling:
        raise UserError("--sweep and --scaling cannot be combined. Use one of them at a time.")
    ranks = int(os.environ["WORLD_SIZE"]) if launched() else nproc or default_nproc()
    with _folder(work) as folder:
        spec = make_spec(
            model,
            overrides,
            data=data,
            method=method,
            length=length,
            rows=rows,
            lengths=lengths,
            labelled=labelled,
            steps=steps,
            checkpoint=checkpoint and not sweep and not launched(),
            folder=folder,
            force=force,
        )
        config = spec.config()
        title = f"{Path(model).name}, {method}, {config.model.dtype}, {rows} x {length} tokens per step, {ranks} ranks"
        report: dict[str, Any] = {"kind": "single", "title": title, **machine(), "formula": FORMULA}
        if sweep:
            swept = {key: _usable(key, values, rows) for key, values in SWEPT.items()}
            found = measure.sweep(spec, swept, nproc=ranks, folder=folder, say=say)
            return report | {"kind": "sweep", "swept": list(swept), "measurements": found}
        if scaling:
            worlds = [world for world in (1, 2, 4, 8, 16) if world <= (nproc or 4)]
            found = scale(spec, worlds, weak=scaling == "weak", folder=folder, say=say)
            return report | {"kind": "scaling", "scaling": scaling, "measurements": found}
        measured = measure_once(spec, nproc=ranks)
        return report | {"measurements": [measured] if measured else []}


@contextlib.contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    """The folder where the ranks write. Checkpoints are deleted at the end, and so is a temporary folder unless its
    logs explain why a measurement failed."""
    if launched():
        # all ranks of a launcher's world share a folder; they write no commit, so earlier files cannot interfere
        yield work or Path(tempfile.gettempdir()) / f"ft_dist-bench-{port()}"
        return
    if work:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    folder = work or Path(tempfile.mkdtemp(prefix="ft_dist-bench-"))
    kept = work is not None
    try:
        yield folder
    except UserError:
        kept = kept or any(folder.rglob(LOG))
        raise
    finally:
        for saved in [*folder.rglob("checkpoints")] if kept else [folder]:
            shutil.rmtree(saved, ignore_errors=True)


def _usable(key: str, values: list[Any], rows: int) -> list[Any]:
    """Drop micro-batches larger than the rows of a step: they are not distinct settings."""
    return [value for value in values if key != "batch.micro_rows" or value <= rows]


def port() -> str:
    """A number that the ranks of one launch share and other launches do not."""
    return os.environ.get("MASTER_PORT", os.environ.get("SLURM_JOB_ID", "0"))


def machine() -> dict[str, str]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
    }


def cpu_name() -> str:
    """The processor's model name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
