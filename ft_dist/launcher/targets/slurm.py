"""SLURM: a job script that saves, requeues itself and goes on; https://slurm.schedmd.com/sbatch.html."""

import os
from datetime import datetime
from pathlib import Path

from ft_dist.config import dump_config
from ft_dist.errors import UserError
from ft_dist.launcher.record import JobState, Record, by_folder, new_record
from ft_dist.launcher.request import Request, Run, job_name
from ft_dist.launcher.submission import Submission, call
from ft_dist.launcher.targets.render import render

NAME = "slurm"
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
REQUEUE_PAUSE_S = 20
"""The end of the start before may reach the controller late, and would be taken for that of the next: SLURM's source
gives at least ten seconds"""
RUNNING = ("RUNNING", "COMPLETING", "STOPPED", "SUSPENDED", "SIGNALING", "STAGE_OUT", "RESIZING")


def plan(request: Request, runs: list[Run]) -> Submission:
    """One job for a run, one job array for a sweep."""
    sweep = len(runs) > 1
    base = runs[0].folder.parent if sweep else runs[0].folder
    script, log = base / "launch" / "job.sbatch", base / "logs" / ("slurm-%a.log" if sweep else "slurm.log")
    text = render(
        "job.sbatch.j2",
        name=job_name(base),
        **request.values,
        slurm=request.profile.slurm,
        folders=[str(run.folder) for run in runs],
        folder_of_work=os.getcwd(),
        log=str(log),
        margin_s=runs[0].config.preemption.margin_s,
    )
    return Submission(
        target=NAME,
        runs=runs,
        script=script,
        files={script: text} | {run.pinned: dump_config(run.config) for run in runs},
        command=["sbatch", "--parsable", str(script)],
        logs=[Path(str(log).replace("%a", str(task))) for task in range(len(runs))],
    )


def submit(submission: Submission) -> list[Record]:
    """sbatch takes the environment of this shell along by itself; the script holds none of it."""
    for log in submission.logs:
        assert log is not None
        log.parent.mkdir(parents=True, exist_ok=True)
    job = call(submission.command).split(";")[0]
    if len(submission.runs) == 1:
        return [new_record(target=NAME, job=job, command=submission.command, log=submission.logs[0])]
    *sbatch, script = submission.command
    return [
        new_record(target=NAME, job=f"{job}_{task}", command=[*sbatch, f"--array={task}", script], log=log)
        for task, log in enumerate(submission.logs)
    ]


def submit_again(record: Record, folder: Path) -> str:
    """The new job's id."""
    job = call(record.command).split(";")[0]
    task = record.job.partition("_")[2]
    return f"{job}_{task}" if task else job


def state(record: Record, folder: Path) -> JobState:
    """By the controller, and by the run folder once the controller has forgotten the job."""
    shown = _job(record.job)
    if shown is None:
        return by_folder(folder)
    word = shown["JobState"]
    reason = shown.get("Reason", "None")
    detail = word if reason in ("None", "") else f"{word} ({reason})"
    if shown.get("Restarts", "0") != "0":
        detail += f", requeued {shown['Restarts']} times"
    if word in WAITING or word in RUNNING:
        return JobState("pending" if word in WAITING else "running", detail)
    ended = by_folder(folder)
    code = int(shown.get("ExitCode", "0:0").split(":")[0])
    if word == "COMPLETED":
        return JobState(ended.state if ended.state == "finished" else "stopped", detail, code)
    return JobState("stopped" if word == "CANCELLED" else "failed", detail, code)


def stop(record: Record) -> str:
    """Ask the run to commit and leave; returns what was done. The stop mark keeps its script from requeueing."""
    shown = _job(record.job)
    if shown and shown["JobState"] in WAITING:
        call(["scancel", record.job])
        return f"job {record.job} taken out of the queue"
    call(["scancel", "--signal=USR1", "--batch", record.job])
    return f"job {record.job} was told to commit and leave"


def go_on_soon(record: Record) -> None:
    """Shorten the two minutes that a requeued job waits to REQUEUE_PAUSE_S; its owner may."""
    shown = _job(record.job)
    if shown and shown["JobState"] == "PENDING" and shown.get("Reason") == "BeginTime" and shown["Restarts"] != "0":
        requeued, begins = (datetime.fromisoformat(shown[name]) for name in ("SubmitTime", "EligibleTime"))
        if (begins - requeued).total_seconds() > 2 * REQUEUE_PAUSE_S:
            start = f"StartTime=now+{REQUEUE_PAUSE_S}"
            call(["scontrol", "update", f"JobId={record.job}", start], check=False)


def _job(job: str) -> dict[str, str] | None:
    """What the controller knows of a job, or None. Raises UserError if it does not answer."""
    try:
        shown = call(["scontrol", "show", "job", "--oneliner", job])
    except UserError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return dict(part.partition("=")[::2] for part in shown.splitlines()[0].split())
