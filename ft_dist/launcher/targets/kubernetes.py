"""Kubernetes: a JobSet, or Kubeflow's PyTorchJob; one pod a node, which runs the node agent.

https://jobset.sigs.k8s.io and https://www.kubeflow.org/docs/components/trainer/legacy-v1/. What leaves with 75 is
started again without end, 2 is never, and all else as often as the profile says.
"""

import json
from pathlib import Path

from ft_dist.errors import ConfigError
from ft_dist.launcher.record import JobState, Record, new_record
from ft_dist.launcher.request import Request, Run, job_name
from ft_dist.launcher.submission import Submission, call
from ft_dist.launcher.targets.elsewhere import PORT, arguments, embedded, only_run
from ft_dist.launcher.targets.render import render

NAME = "k8s"
CONFIG = "/etc/ft_dist/config.yaml"
SAVE_S = 60
"""Grace beyond preemption.margin_s for a step and a commit"""


def plan(request: Request, runs: list[Run]) -> Submission:
    run, profile = only_run(request, runs), request.profile
    if not profile.container:
        raise ConfigError("--on k8s needs an image that holds ft_dist: set container in the --profile.")
    script = run.folder / "launch" / f"{profile.kubernetes.kind}.yaml"
    text = render(
        f"{profile.kubernetes.kind}.yaml.j2",
        name=job_name(run.folder),
        **request.values,
        kubernetes=profile.kubernetes,
        config=embedded(request, run),
        arguments=arguments(request, run, config=CONFIG),
        grace_s=run.config.preemption.margin_s + SAVE_S,
        port=PORT,
    )
    return Submission(NAME, runs, script, {script: text}, ["kubectl", "apply", "-f", str(script)], [None])


def submit(submission: Submission) -> list[Record]:
    call(submission.command)
    kind = submission.script.stem
    namespace = next(line.split(": ")[1] for line in submission.text().splitlines() if "namespace:" in line)
    job = f"{json.loads(namespace)}/{kind}/{job_name(submission.runs[0].folder)}"
    return [new_record(target=NAME, job=job, command=submission.command, log=None)]


def submit_again(record: Record, folder: Path) -> str:
    """A finished or failed object is not started again by `apply`: it goes first."""
    stop(record)
    call(record.command)
    return record.job


def state(record: Record, folder: Path) -> JobState:
    namespace, kind, name = record.job.split("/")
    shown = call(["kubectl", "-n", namespace, "get", kind, name, "--ignore-not-found", "-o", "json"])
    if not shown:
        return JobState("unknown", "not in the cluster")
    conditions = json.loads(shown).get("status", {}).get("conditions", [])
    true = [condition["type"] for condition in conditions if condition["status"] == "True"]
    for word, meaning in (("Failed", "failed"), ("Completed", "finished"), ("Succeeded", "finished")):
        if word in true:
            return JobState(meaning, word)
    return JobState("running", ", ".join(true))


def stop(record: Record) -> str:
    """Pods get SIGTERM and the grace to commit in."""
    namespace, kind, name = record.job.split("/")
    call(["kubectl", "-n", namespace, "delete", kind, name, "--ignore-not-found", "--wait=true"])
    return f"{kind} {name} committed and is deleted"


def log_command(record: Record) -> list[str]:
    namespace, kind, name = record.job.split("/")
    label = "jobset.sigs.k8s.io/jobset-name" if kind == "jobset" else "training.kubeflow.org/job-name"
    return ["kubectl", "-n", namespace, "logs", "--follow", "--prefix", f"--selector={label}={name}"]
