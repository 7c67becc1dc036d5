"""SLURM: a job script that commits, requeues itself and resumes; https://slurm.schedmd.com/sbatch.html."""

import os
from datetime import datetime
from pathlib import Path

from ft_dist.config import dump_config
from ft_dist.errors import ConfigError, UserError
from ft_dist.launcher.record import JobState, LaunchRecord, new_record, state_of_folder
from ft_dist.launcher.request import Request, RequestedRun, job_name
from ft_dist.launcher.submission import Submission, call
from ft_dist.launcher.targets.protocol import Target
from ft_dist.launcher.templates import render
from ft_dist.run_folder import RunFolder

PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "STOPPED", "SUSPENDED", "SIGNALING", "STAGE_OUT", "RESIZING")
REQUEUE_PAUSE_S = 20
"""The controller may learn late that the previous start ended, and would then count that as the end of the next one.
SLURM's own source allows at least ten seconds"""


class Slurm(Target):
    name = "slurm"
    shares_disks = True

    def plan(self, request: Request, runs: list[RequestedRun]) -> Submission:
        """One job per run, one job array per sweep."""
        sweep = len(runs) > 1
        base = runs[0].folder.parent if sweep else runs[0].folder
        script = RunFolder(base).launch / "job.sbatch"
        if "\\" in str(base):
            raise ConfigError(
                f"output_dir={base}: SLURM cannot write a log below a folder with a backslash in its name. Rename it."
            )
        log = RunFolder(base).logs / ("slurm-%a.log" if sweep else "slurm.log")
        text = render(
            "job.sbatch.j2",
            name=job_name(base),
            **request.values,
            slurm=request.profile.slurm,
            folders=[str(run.folder) for run in runs],
            working_folder=os.getcwd(),
            log=f"{str(log.parent).replace('%', '%%')}/{log.name}",  # %a is sbatch's, other signs are the path's
            margin_s=runs[0].config.preemption.margin_s,
        )
        return Submission(
            target=self.name,
            runs=runs,
            script=script,
            files={script: text} | {run.pinned: dump_config(run.config) for run in runs},
            command=["sbatch", "--parsable", str(script)],
            logs=[log.with_name(log.name.replace("%a", str(task))) for task in range(len(runs))],
        )

    def submit(self, submission: Submission) -> list[LaunchRecord]:
        """sbatch passes on this shell's environment; the script contains none of it."""
        for log in submission.logs:
            assert log is not None
            log.parent.mkdir(parents=True, exist_ok=True)
        job = call(submission.command).split(";")[0]
        if len(submission.runs) == 1:
            return [new_record(target=self.name, job=job, command=submission.command, log=submission.logs[0])]
        *sbatch, script = submission.command
        return [
            new_record(target=self.name, job=f"{job}_{task}", command=[*sbatch, f"--array={task}", script], log=log)
            for task, log in enumerate(submission.logs)
        ]

    def resubmit(self, record: LaunchRecord, folder: Path) -> str:
        job = call(record.command).split(";")[0]
        task = record.job.partition("_")[2]
        return f"{job}_{task}" if task else job

    def state(self, record: LaunchRecord, folder: Path) -> JobState:
        """From the controller, or from the run folder once the controller has forgotten the job."""
        shown = _job(record.job)
        if shown is None:
            return state_of_folder(folder)
        word = shown["JobState"]
        reason = shown.get("Reason", "None")
        detail = word if reason in ("None", "") else f"{word} ({reason})"
        if shown.get("Restarts", "0") != "0":
            detail += f", requeued {shown['Restarts']} times"
        if word in PENDING or word in RUNNING:
            return JobState("pending" if word in PENDING else "running", detail)
        ended = state_of_folder(folder)
        code = int(shown.get("ExitCode", "0:0").split(":")[0])
        if word == "COMPLETED":
            return JobState(ended.state if ended.state == "finished" else "stopped", detail, code)
        return JobState("stopped" if word == "CANCELLED" else "failed", detail, code)

    def stop(self, record: LaunchRecord) -> str:
        """Ask the run to commit and end. The stop marker keeps its script from requeueing."""
        shown = _job(record.job)
        if shown and shown["JobState"] in PENDING:
            call(["scancel", record.job])
            return f"job {record.job} was removed from the queue"
        call(["scancel", "--signal=USR1", "--batch", record.job])
        return f"job {record.job} was asked to commit and end"

    def while_following(self, record: LaunchRecord) -> None:
        """Shorten the two minutes that a requeued job waits to REQUEUE_PAUSE_S, as its owner may."""
        shown = _job(record.job)
        if shown and shown["JobState"] == "PENDING" and shown.get("Reason") == "BeginTime" and shown["Restarts"] != "0":
            requeued, begins = (datetime.fromisoformat(shown[name]) for name in ("SubmitTime", "EligibleTime"))
            if (begins - requeued).total_seconds() > 2 * REQUEUE_PAUSE_S:
                start = f"StartTime=now+{REQUEUE_PAUSE_S}"
                call(["scontrol", "update", f"JobId={record.job}", start], check=False)


def _job(job: str) -> dict[str, str] | None:
    """What the controller knows about a job, or None. Raises UserError if it does not answer."""
    try:
        shown = call(["scontrol", "show", "job", "--oneliner", job])
    except UserError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return dict(part.partition("=")[::2] for part in shown.splitlines()[0].split())
