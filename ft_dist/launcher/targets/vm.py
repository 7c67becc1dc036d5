"""A plain machine of any cloud: a loop that resumes from the bucket, and a systemd unit that starts it at every boot.

Both files belong in the image or the start-up script of a spot machine; the next machine to boot resumes the run.
"""

import getpass
import re
from pathlib import Path

from ft_dist.errors import UserError
from ft_dist.launcher.record import JobState, LaunchRecord, new_record
from ft_dist.launcher.request import Request, RequestedRun, job_name
from ft_dist.launcher.submission import Submission
from ft_dist.launcher.targets.protocol import Target
from ft_dist.launcher.targets.remote import agent_arguments, checked_run, embedded_config
from ft_dist.launcher.templates import render
from ft_dist.run_folder import RunFolder


class VirtualMachine(Target):
    """Only writes the files: this machine cannot reach the other one."""

    name = "vm"

    def plan(self, request: Request, runs: list[RequestedRun]) -> Submission:
        run = checked_run(request, runs)
        if request.nodes.most > 1:
            raise UserError(f"--on vm uses one machine, not --nodes {request.nodes}. Use --on torchrun, sky or k8s.")
        name = job_name(run.folder)
        script, unit = RunFolder(run.folder).launch / "vm.sh", RunFolder(run.folder).launch / f"{name}.service"
        loop = render(
            "vm.sh.j2",
            name=name,
            **request.values,
            output_dir=run.config.output_dir,
            config=embedded_config(request, run),
            arguments=agent_arguments(request, run, config="config.yaml"),
        )
        service = render("vm.service.j2", name=name, user=_user(), margin_s=run.config.preemption.margin_s)
        next_steps = (
            f"On the machine, or in its start-up script:\n"
            f"  sudo install -m 755 vm.sh /usr/local/bin/{name}\n"
            f"  sudo install -m 644 {name}.service /etc/systemd/system/\n"
            f"  sudo systemctl enable --now {name}\n"
            f"The files are in {script.parent}; credentials go in /etc/ft_dist/credentials.env (NAME=value), mode 600."
        )
        return Submission(self.name, runs, script, {script: loop, unit: service}, [], [None], next_steps)

    def submit(self, submission: Submission) -> list[LaunchRecord]:
        return [new_record(target=self.name, job=job_name(submission.runs[0].folder), command=[], log=None)]

    def resubmit(self, record: LaunchRecord, folder: Path) -> str:
        raise UserError(f"{folder}: this run is resumed on its own machine: `sudo systemctl restart {record.job}`.")

    def state(self, record: LaunchRecord, folder: Path) -> JobState:
        return JobState("unknown", f"check on its own machine: systemctl status {record.job}")

    def stop(self, record: LaunchRecord) -> str:
        raise UserError(f"this run is stopped on its own machine: `sudo systemctl stop {record.job}`.")

    def log_command(self, record: LaunchRecord) -> list[str]:
        raise UserError(f"the log is on the run's own machine: `journalctl -fu {record.job}`.")


def _user() -> str:
    user = getpass.getuser()
    if not re.fullmatch(r"[A-Za-z_][\w.-]*", user, re.ASCII):
        raise UserError(f"user {user!r}: no name for a systemd unit. Set LOGNAME to the user of the other machine.")
    return user
