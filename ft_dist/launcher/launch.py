"""`ft-dist launch`, and what is asked of a launched run by its folder: status, logs, stop, resume.

A target is a module with `plan`, `submit`, `submit_again`, `state` and `stop`.
"""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ft_dist.check import check
from ft_dist.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, UserError
from ft_dist.launcher.follow import follow
from ft_dist.launcher.record import RECORD, JobState, Record, progress, read_record, stop_mark
from ft_dist.launcher.request import SEES_OUR_DISKS, Request, runs_of
from ft_dist.launcher.submission import Submission
from ft_dist.launcher.targets import here, kubernetes, sky, slurm, vm
from ft_dist.plan.gpu import device_here
from ft_dist.plan.guard import check_fits, device_called

TARGETS: dict[str, ModuleType] = {
    "local": here,
    "torchrun": here,
    "slurm": slurm,
    "sky": sky,
    "k8s": kubernetes,
    "vm": vm,
}

Say = Callable[[str], None]


def planned(request: Request, *, force: bool = False) -> Submission:
    """What would be submitted, its configs and data checked as `ft-dist check` does, and, unless `force`, whether it
    fits the GPUs that the profile names, or those of this machine. Writes nothing.

    Raises UserError.
    """
    runs = runs_of(request)
    for run in runs if request.target in SEES_OUR_DISKS else []:
        check(run.config, world_size=request.world_size)
    if not force:
        local = request.target == "local" and request.profile.gpu is None
        device = device_here(request.nproc) if local else device_called(request.profile.gpu)
        for run in runs if request.gpus_per_node or local else []:
            check_fits(run.config, ranks=request.world_size, ranks_per_node=request.nproc, device=device)
    return TARGETS[request.target].plan(request, runs)


def submitted(submission: Submission) -> list[Record]:
    """Write the files, submit, and leave a record in every run folder. Raises UserError where a run is active."""
    for run in submission.runs:
        _not_active(run.folder)
    submission.write()
    for run in submission.runs:
        stop_mark(run.folder).unlink(missing_ok=True)
    records = TARGETS[submission.target].submit(submission)
    for run, record in zip(submission.runs, records, strict=True):
        record.write(run.folder)
    return records


def status(folder: Path) -> dict[str, Any]:
    """Target, job, state, the last step and the newest commit of a launched run."""
    record = read_record(folder)
    state = _state(record, folder)
    return {
        "run": str(folder),
        "target": record.target,
        "job": record.job,
        "state": state.state,
        "detail": state.detail,
        "log": record.log,
    } | progress(folder)


def show_log(folder: Path, show: Say) -> None:
    """What the log of a run holds now."""
    log = read_record(folder).log
    if log and Path(log).exists():
        show(Path(log).read_text(encoding="utf-8", errors="replace"))


def watch(folder: Path, *, start: int = 0, say: Say, show: Say) -> int:
    """Show the log of a run until it ends; returns the exit code that its end means."""
    record = read_record(folder)
    if record.log is None:
        return subprocess.run(TARGETS[record.target].log_command(record)).returncode
    log = Path(record.log)

    def ask_state() -> JobState:
        if record.target == slurm.NAME:
            slurm.go_on_soon(record)
        return _state(record, folder)

    try:
        state = follow(log, start=start, ask_state=ask_state, say=say, show=show)
    except KeyboardInterrupt:
        say(f"the run goes on without us: `ft-dist logs {folder}` shows it, `ft-dist stop {folder}` ends it")
        return EXIT_FINISHED
    return {"finished": EXIT_FINISHED, "stopped": EXIT_PREEMPTED}.get(state.state, state.code or EXIT_FAILED)


def log_size(log: Path | None) -> int:
    """Bytes of a log so far: an earlier job's part is not shown again."""
    return log.stat().st_size if log and log.exists() else 0


def stop(folder: Path) -> str:
    """Have the run commit and end, and not be started again by its scheduler."""
    record = read_record(folder)
    if not _state(record, folder).active:
        raise UserError(f"{folder}: not running (job {record.job} of {record.target}), so there is nothing to stop.")
    stop_mark(folder).parent.mkdir(parents=True, exist_ok=True)
    stop_mark(folder).touch()
    return str(TARGETS[record.target].stop(record))


def resume(folder: Path) -> Record:
    """Submit the run again as it was; it goes on from its newest commit. Raises UserError while it is active."""
    record = read_record(folder)
    _not_active(folder)
    stop_mark(folder).unlink(missing_ok=True)
    record = replace(record, job=TARGETS[record.target].submit_again(record, folder))
    record.write(folder)
    return record


def _not_active(folder: Path) -> None:
    """Two jobs in one run folder would overwrite each other's commits."""
    if not (folder / RECORD).exists():
        return
    record = read_record(folder)
    if _state(record, folder).active:
        raise UserError(
            f"{folder}: job {record.job} of {record.target} is at it already. `ft-dist logs {folder}` shows it, "
            f"`ft-dist stop {folder}` ends it; or use another output_dir."
        )


def _state(record: Record, folder: Path) -> JobState:
    state: JobState = TARGETS[record.target].state(record, folder)
    return state
