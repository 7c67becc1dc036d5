"""SkyPilot: a managed job on spot machines, recovered in any zone with capacity, with its commits in a bucket.

https://docs.skypilot.co/en/latest/examples/managed-jobs.html
"""

import json
import os
from pathlib import Path

from ft_dist.errors import ConfigError
from ft_dist.launcher.record import JobState, LaunchRecord, new_record
from ft_dist.launcher.request import Request, RequestedRun, job_name
from ft_dist.launcher.submission import Submission, call
from ft_dist.launcher.targets.protocol import Target
from ft_dist.launcher.targets.remote import CREDENTIALS, RENDEZVOUS_PORT, agent_arguments, checked_run, embedded_config
from ft_dist.launcher.templates import render
from ft_dist.run_folder import RunFolder

STATES = {"SUCCEEDED": "finished", "CANCELLED": "stopped", "CANCELLING": "stopped", "PENDING": "pending"}


class Sky(Target):
    name = "sky"

    def plan(self, request: Request, runs: list[RequestedRun]) -> Submission:
        run, profile = checked_run(request, runs), request.profile
        if request.gpus_per_node and not profile.gpu:
            raise ConfigError("--on sky needs the name of the GPU: set gpu, such as H100, in the --profile.")
        if not profile.container and not profile.sky.setup:
            raise ConfigError("--on sky installs ft_dist on new machines: set container or sky.setup in the --profile.")
        script = RunFolder(run.folder).launch / "sky.yaml"
        text = render(
            "sky.yaml.j2",
            name=job_name(run.folder),
            **request.values,
            sky=profile.sky,
            config=embedded_config(request, run),
            arguments=agent_arguments(request, run, config="config.yaml"),
            port=RENDEZVOUS_PORT,
        )
        job = job_name(run.folder)
        secrets = [word for name in CREDENTIALS if name in os.environ for word in ("--secret", name)]
        command = ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job, *secrets, str(script)]
        return Submission(self.name, runs, script, {script: text}, command, [None])

    def submit(self, submission: Submission) -> list[LaunchRecord]:
        call(submission.command)
        job = job_name(submission.runs[0].folder)
        return [new_record(target=self.name, job=job, command=submission.command, log=None)]

    def resubmit(self, record: LaunchRecord, folder: Path) -> str:
        call(record.command)
        return record.job

    def state(self, record: LaunchRecord, folder: Path) -> JobState:
        jobs = json.loads(call(["sky", "jobs", "queue", "--output", "json"]) or "[]")
        found = [job for job in jobs if job.get("job_name") == record.job]
        if not found:
            return JobState("unknown", "not in `sky jobs queue`")
        word = str(max(found, key=lambda job: int(job["job_id"]))["status"]).rpartition(".")[2]
        return JobState("failed" if word.startswith("FAILED") else STATES.get(word, "running"), word)

    def stop(self, record: LaunchRecord) -> str:
        call(["sky", "jobs", "cancel", "--yes", "--name", record.job])
        return f"job {record.job} was cancelled; its newest commit is in the bucket"

    def log_command(self, record: LaunchRecord) -> list[str]:
        return ["sky", "jobs", "logs", "--name", record.job]
