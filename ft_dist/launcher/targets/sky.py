"""SkyPilot: a managed job on spot machines, recovered in whatever zone has some, its commits in a bucket.

https://docs.skypilot.co/en/latest/examples/managed-jobs.html
"""

import json
import os
from pathlib import Path

from ft_dist.errors import ConfigError
from ft_dist.launcher.record import JobState, Record, new_record
from ft_dist.launcher.request import Request, Run, job_name
from ft_dist.launcher.submission import Submission, call
from ft_dist.launcher.targets.elsewhere import CREDENTIALS, PORT, arguments, embedded, only_run
from ft_dist.launcher.targets.render import render

NAME = "sky"
STATES = {"SUCCEEDED": "finished", "CANCELLED": "stopped", "CANCELLING": "stopped", "PENDING": "pending"}


def plan(request: Request, runs: list[Run]) -> Submission:
    run, profile = only_run(request, runs), request.profile
    if request.gpus_per_node and not profile.gpu:
        raise ConfigError("--on sky needs the GPU's name: set gpu, such as H100, in the --profile.")
    if not profile.container and not profile.sky.setup:
        raise ConfigError("--on sky needs ft_dist on new machines: set container or sky.setup in the --profile.")
    script = run.folder / "launch" / "sky.yaml"
    text = render(
        "sky.yaml.j2",
        name=job_name(run.folder),
        **request.values,
        sky=profile.sky,
        config=embedded(request, run),
        arguments=arguments(request, run, config="config.yaml"),
        port=PORT,
    )
    secrets = [word for name in CREDENTIALS if name in os.environ for word in ("--secret", name)]
    command = ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job_name(run.folder), *secrets, str(script)]
    return Submission(NAME, runs, script, {script: text}, command, [None])


def submit(submission: Submission) -> list[Record]:
    call(submission.command)
    name = job_name(submission.runs[0].folder)
    return [new_record(target=NAME, job=name, command=submission.command, log=None)]


def submit_again(record: Record, folder: Path) -> str:
    call(record.command)
    return record.job


def state(record: Record, folder: Path) -> JobState:
    jobs = json.loads(call(["sky", "jobs", "queue", "--output", "json"]) or "[]")
    found = [job for job in jobs if job.get("job_name") == record.job]
    if not found:
        return JobState("unknown", "not in `sky jobs queue`")
    word = str(max(found, key=lambda job: int(job["job_id"]))["status"]).rpartition(".")[2]
    return JobState("failed" if word.startswith("FAILED") else STATES.get(word, "running"), word)


def stop(record: Record) -> str:
    call(["sky", "jobs", "cancel", "--yes", "--name", record.job])
    return f"job {record.job} is cancelled; its newest commit is in the bucket"


def log_command(record: Record) -> list[str]:
    return ["sky", "jobs", "logs", "--name", record.job]
