"""Kubernetes: a JobSet or Kubeflow's PyTorchJob, with one pod per node, which runs the node agent.

https://jobset.sigs.k8s.io and https://www.kubeflow.org/docs/components/trainer/legacy-v1/. A pod that exits with 75 is
always restarted, one that exits with 2 never, and any other as often as the profile allows.
"""

import json
from pathlib import Path

from ft_dist.errors import ConfigError, UserError
from ft_dist.launcher.record import JobState, LaunchRecord, new_record
from ft_dist.launcher.request import Request, RequestedRun, job_name
from ft_dist.launcher.submission import Submission, call
from ft_dist.launcher.targets.protocol import Target
from ft_dist.launcher.targets.remote import RENDEZVOUS_PORT, agent_arguments, checked_run, embedded_config
from ft_dist.launcher.templates import render
from ft_dist.run_folder import RunFolder

CONFIG = "/etc/ft_dist/config.yaml"
COMMIT_S = 60
"""Grace period beyond preemption.margin_s, for a step and a commit"""


class Kubernetes(Target):
    name = "k8s"

    def plan(self, request: Request, runs: list[RequestedRun]) -> Submission:
        run, profile = checked_run(request, runs), request.profile
        if not profile.container:
            raise ConfigError("--on k8s needs an image that contains ft_dist: set container in the --profile.")
        script = RunFolder(run.folder).launch / f"{profile.kubernetes.kind}.yaml"
        text = render(
            f"{profile.kubernetes.kind}.yaml.j2",
            name=job_name(run.folder),
            **request.values,
            kubernetes=profile.kubernetes,
            config=embedded_config(request, run),
            arguments=agent_arguments(request, run, config=CONFIG),
            grace_s=run.config.preemption.margin_s + COMMIT_S,
            port=RENDEZVOUS_PORT,
        )
        return Submission(self.name, runs, script, {script: text}, ["kubectl", "apply", "-f", str(script)], [None])

    def submit(self, submission: Submission) -> list[LaunchRecord]:
        call(submission.command)
        kind = submission.script.stem
        namespace = next(line.split(": ")[1] for line in submission.text().splitlines() if "namespace:" in line)
        job = f"{json.loads(namespace)}/{kind}/{job_name(submission.runs[0].folder)}"
        return [new_record(target=self.name, job=job, command=submission.command, log=None)]

    def resubmit(self, record: LaunchRecord, folder: Path) -> str:
        """`apply` does not restart a finished or failed object, so it is deleted first."""
        self.stop(record)
        call(record.command)
        return record.job

    def state(self, record: LaunchRecord, folder: Path) -> JobState:
        namespace, kind, name = _parts(record)
        shown = call(["kubectl", "-n", namespace, "get", kind, name, "--ignore-not-found", "-o", "json"])
        if not shown:
            return JobState("unknown", "not in the cluster")
        conditions = json.loads(shown).get("status", {}).get("conditions", [])
        true = [condition["type"] for condition in conditions if condition["status"] == "True"]
        for word, meaning in (("Failed", "failed"), ("Completed", "finished"), ("Succeeded", "finished")):
            if word in true:
                return JobState(meaning, word)
        return JobState("running", ", ".join(true))

    def stop(self, record: LaunchRecord) -> str:
        """The pods get SIGTERM and a grace period in which to commit."""
        namespace, kind, name = _parts(record)
        call(["kubectl", "-n", namespace, "delete", kind, name, "--ignore-not-found", "--wait=true"])
        return f"{kind} {name} committed and was deleted"

    def log_command(self, record: LaunchRecord) -> list[str]:
        namespace, kind, name = _parts(record)
        label = "jobset.sigs.k8s.io/jobset-name" if kind == "jobset" else "training.kubeflow.org/job-name"
        return ["kubectl", "-n", namespace, "logs", "--follow", "--prefix", f"--selector={label}={name}"]


def _parts(record: LaunchRecord) -> list[str]:
    """Namespace, kind and name."""
    parts = record.job.split("/")
    if len(parts) != 3:
        raise UserError(f"launch.json: job={record.job} is not NAMESPACE/KIND/NAME. Launch the run again.")
    return parts
