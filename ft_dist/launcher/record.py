"""`output_dir/launch.json`: what was submitted and as which job, for `ft-dist status|logs|stop|resume`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from ft_dist.errors import UserError
from ft_dist.launcher.elastic.restarts import newest_commit
from ft_dist.observe.files import last_record, write_json
from ft_dist.outside import Document, parse_document
from ft_dist.run_folder import RunFolder

ACTIVE = ("pending", "running")


class LaunchRecord(Document):
    """`command` submits the run again unchanged; `log` is its console. Holds no environment and no credentials."""

    target: str
    job: str = Field(pattern=r"^[A-Za-z0-9][\w.@:+-]*(/[\w.-]+/[\w.-]+)?$")
    """As the target names it; targets pass it to programs, so it never looks like an option"""
    command: list[str]
    log: str | None
    submitted_at: float

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(RunFolder(folder).launch_record, self.model_dump())


@dataclass(frozen=True)
class JobState:
    """`state`: pending, running, finished, stopped (committed, not restarted automatically), failed or unknown.

    `detail` is the platform's own term; `code` the exit code, if known.
    """

    state: str
    detail: str = ""
    code: int | None = None

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def read_record(folder: Path) -> LaunchRecord:
    """Raises UserError if the folder is not that of a launched run."""
    path = RunFolder(folder).launch_record
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        runs = sorted(found.parent.name for found in folder.glob(f"*/{path.name}"))
        hint = f"It is a sweep of {len(runs)} runs: name one, such as {folder / runs[0]}." if runs else ""
        raise UserError(
            f"{folder}: no {path.name}, so no run was launched into this folder. "
            + (hint or "Name the output_dir of a run that `ft-dist launch` started.")
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Launch the run again.") from None
    return parse_document(content, LaunchRecord, where=path, error=UserError)


def new_record(*, target: str, job: str, command: Sequence[str], log: Path | None) -> LaunchRecord:
    return LaunchRecord(
        target=target,
        job=job,
        command=list(command),
        log=str(log) if log else None,
        submitted_at=round(time.time(), 3),
    )


def stop_marker(folder: Path) -> Path:
    """While this file exists, scripts that restart the run automatically do not."""
    return RunFolder(folder).launch / "stopped"


def state_of_folder(folder: Path) -> JobState:
    """State of a run that is no longer active, from its folder alone."""
    if RunFolder(folder).summary.is_file():
        return JobState("finished", code=0)
    last = (last_record(RunFolder(folder).events) or {}).get("event", "")
    return JobState("stopped" if last == "preempted" or stop_marker(folder).exists() else "failed")


def progress(folder: Path) -> dict[str, Any]:
    """The last recorded step, its loss, and the newest commit; None for what does not exist yet."""
    last = last_record(RunFolder(folder).metrics) or {}
    return {"step": last.get("step"), "loss": last.get("loss"), "commit": newest_commit(folder) or None}
