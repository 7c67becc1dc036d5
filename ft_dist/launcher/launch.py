"""`ft-dist launch`, and the verbs that take the folder of a launched run: status, logs, stop, resume."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ft_dist.check import check, check_method
from ft_dist.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, UserError
from ft_dist.launcher.follow import follow
from ft_dist.launcher.options import requested_runs
from ft_dist.launcher.record import JobState, LaunchRecord, progress, read_record, stop_marker
from ft_dist.launcher.request import Request
from ft_dist.launcher.submission import Submission
from ft_dist.launcher.targets.table import find_target
from ft_dist.plan.guard import check_fits
from ft_dist.run_folder import RunFolder

Print = Callable[[str], None]


def plan_submission(request: Request, *, force: bool = False) -> Submission:
    """Check the configs and data as `ft-dist check` does, then render what `submit` would submit. Writes nothing.

    Unless `force`, also check that the run fits the GPUs that the profile names, or those of this machine. Raises
    UserError.
    """
    target = find_target(request.target)
    runs = requested_runs(request)
    for run in runs if request.shares_disks else []:
        check(run.config, world_size=request.world_size)
        check_method(run.config)
    device = None if force else target.device(request)
    if device:
        for run in runs:
            check_fits(run.config, ranks=request.world_size, ranks_per_node=request.nproc, device=device)
    return target.plan(request, runs)


def submit(submission: Submission) -> list[LaunchRecord]:
    """Write the files, submit them, and write a record into every run folder. Raises UserError if a run is active."""
    for run in submission.runs:
        _check_inactive(run.folder)
    submission.write()
    for run in submission.runs:
        stop_marker(run.folder).unlink(missing_ok=True)
    records = find_target(submission.target).submit(submission)
    for run, record in zip(submission.runs, records, strict=True):
        record.write(run.folder)
    return records


def status(folder: Path) -> dict[str, Any]:
    """Target, job, state, last step and newest commit of a launched run."""
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


def show_log(folder: Path, show: Print) -> None:
    """Show the log of a run as it is now."""
    log = read_record(folder).log
    if log and Path(log).exists():
        show(Path(log).read_text(encoding="utf-8", errors="replace"))


def watch(folder: Path, *, start: int = 0, say: Print, show: Print) -> int:
    """Show the log of a run until the run ends; returns the exit code that reflects how it ended."""
    record = read_record(folder)
    target = find_target(record.target)
    if record.log is None:
        return subprocess.run(target.log_command(record)).returncode
    log = Path(record.log)

    def poll_state() -> JobState:
        target.while_following(record)
        return target.state(record, folder)

    try:
        state = follow(log, start=start, poll_state=poll_state, say=say, show=show)
    except KeyboardInterrupt:
        say(f"the run continues in the background: `ft-dist logs {folder}` shows it, `ft-dist stop {folder}` ends it")
        return EXIT_FINISHED
    return {"finished": EXIT_FINISHED, "stopped": EXIT_PREEMPTED}.get(state.state, state.code or EXIT_FAILED)


def log_size(log: Path | None) -> int:
    """Size of a log in bytes, so that the part of an earlier job can be skipped."""
    return log.stat().st_size if log and log.exists() else 0


def stop(folder: Path) -> str:
    """Ask the run to commit and end, and keep its scheduler from restarting it."""
    record = read_record(folder)
    if not _state(record, folder).active:
        raise UserError(f"{folder}: not running (job {record.job} of {record.target}), so there is nothing to stop.")
    stop_marker(folder).parent.mkdir(parents=True, exist_ok=True)
    stop_marker(folder).touch()
    return find_target(record.target).stop(record)


def resume(folder: Path) -> LaunchRecord:
    """Submit the run again, unchanged; it resumes from its newest commit. Raises UserError while it is active."""
    record = read_record(folder)
    _check_inactive(folder)
    stop_marker(folder).unlink(missing_ok=True)
    record = record.model_copy(update={"job": find_target(record.target).resubmit(record, folder)})
    record.write(folder)
    return record


def _check_inactive(folder: Path) -> None:
    """Raise UserError if a job is active in this run folder: two would overwrite each other's commits."""
    if not RunFolder(folder).launch_record.exists():
        return
    record = read_record(folder)
    if _state(record, folder).active:
        raise UserError(
            f"{folder}: job {record.job} of {record.target} is already active. `ft-dist logs {folder}` shows it, "
            f"`ft-dist stop {folder}` ends it; or use another output_dir."
        )


def _state(record: LaunchRecord, folder: Path) -> JobState:
    return find_target(record.target).state(record, folder)
