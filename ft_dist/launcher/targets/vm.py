"""A plain machine of any cloud: a loop that resumes from the bucket, and a systemd unit that starts it at every boot.

Both files go into the image or the start-up script of a spot machine; whichever comes up next goes on with the run.
"""

import getpass
from pathlib import Path

from ft_dist.errors import UserError
from ft_dist.launcher.record import JobState, Record, new_record
from ft_dist.launcher.request import Request, Run, job_name
from ft_dist.launcher.submission import Submission
from ft_dist.launcher.targets.elsewhere import arguments, embedded, only_run
from ft_dist.launcher.targets.render import render

NAME = "vm"


def plan(request: Request, runs: list[Run]) -> Submission:
    run = only_run(request, runs)
    if request.nodes.most > 1:
        raise UserError(f"--on vm is one machine, not --nodes {request.nodes}. Use --on torchrun, sky or k8s.")
    name = job_name(run.folder)
    script, unit = run.folder / "launch" / "vm.sh", run.folder / "launch" / f"{name}.service"
    loop = render(
        "vm.sh.j2",
        name=name,
        **request.values,
        output_dir=run.config.output_dir,
        config=embedded(request, run),
        arguments=arguments(request, run, config="config.yaml"),
    )
    service = render("vm.service.j2", name=name, user=getpass.getuser(), margin_s=run.config.preemption.margin_s)
    afterwards = (
        f"On the machine, or in its start-up script:\n"
        f"  sudo install -m 755 vm.sh /usr/local/bin/{name}\n"
        f"  sudo install -m 644 {name}.service /etc/systemd/system/\n"
        f"  sudo systemctl enable --now {name}\n"
        f"The files are in {script.parent}; credentials go into /etc/ft_dist/credentials.env (NAME=value), mode 600."
    )
    return Submission(NAME, runs, script, {script: loop, unit: service}, [], [None], afterwards)


def submit(submission: Submission) -> list[Record]:
    """Only the files are written: the machine is not ours to reach."""
    return [new_record(target=NAME, job=job_name(submission.runs[0].folder), command=[], log=None)]


def submit_again(record: Record, folder: Path) -> str:
    raise UserError(f"{folder}: its machine starts it; `sudo systemctl restart {record.job}` there.")


def state(record: Record, folder: Path) -> JobState:
    return JobState("unknown", f"its own machine knows: systemctl status {record.job}")


def stop(record: Record) -> str:
    raise UserError(f"its own machine stops it: `sudo systemctl stop {record.job}` there.")


def log_command(record: Record) -> list[str]:
    raise UserError(f"its own machine has the log: `journalctl -fu {record.job}` there.")
