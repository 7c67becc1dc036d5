"""This machine: the node agent in the background, alone (`local`) or as one node of several (`torchrun`).

`torchrun` takes torchrun's arguments: start the same command on every node, with the address of one as HOST:PORT.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ft_dist.config import dump_config
from ft_dist.errors import UserError
from ft_dist.launcher.record import JobState, LaunchRecord, new_record, state_of_folder
from ft_dist.launcher.request import Request, RequestedRun
from ft_dist.launcher.submission import Submission
from ft_dist.launcher.targets.protocol import Target
from ft_dist.launcher.templates import render
from ft_dist.plan.gpu import Device, device_here
from ft_dist.run_folder import RunFolder

STOP_TIMEOUT_S = 600.0


class Torchrun(Target):
    name = "torchrun"
    shares_disks = True
    on_this_machine = True

    def plan(self, request: Request, runs: list[RequestedRun]) -> Submission:
        """One shell script, which is one node of the run. Raises UserError for a sweep or a missing rendezvous."""
        if len(runs) > 1:
            raise UserError(f"--sweep gives {len(runs)} runs, but --on {self.name} takes one. Use --on slurm.")
        if request.nodes.most > 1 and not re.fullmatch(r"[^\s:]+:\d+|\[[^\s]+\]:\d+", request.rdzv or ""):
            raise UserError(
                f"--rdzv {request.rdzv or '(not given)'}: --nodes {request.nodes} needs HOST:PORT of the first node, "
                "the same on every node, for example --rdzv 10.0.0.1:29500."
            )
        if request.profile.container:
            raise UserError(
                f"profile.container={request.profile.container}: --on {self.name} starts no container. Remove it, and "
                "run this command inside the container."
            )
        run = runs[0]
        host = re.sub(r"[^\w.-]", "-", os.uname().nodename)
        suffix = "" if request.nodes.most == 1 else f"-{host}"
        folder = RunFolder(run.folder)
        script, log = folder.launch / f"node{suffix}.sh", folder.logs / f"launch{suffix}.log"
        text = render(
            "node.sh.j2",
            **request.values,
            rdzv=request.rdzv if request.nodes.most > 1 else None,
            run_id=run.folder.name,
            config=str(run.pinned),
            working_folder=os.getcwd(),
        )
        return Submission(
            target=self.name,
            runs=runs,
            script=script,
            files={script: text, run.pinned: dump_config(run.config)},
            command=["bash", str(script)],
            logs=[log],
        )

    def submit(self, submission: Submission) -> list[LaunchRecord]:
        log = submission.logs[0]
        assert log is not None
        job = _start(submission.command, log)
        return [new_record(target=self.name, job=job, command=submission.command, log=log)]

    def resubmit(self, record: LaunchRecord, folder: Path) -> str:
        return _start(record.command, Path(record.log or RunFolder(folder).logs / "launch.log"))

    def state(self, record: LaunchRecord, folder: Path) -> JobState:
        pid = _running_pid(record.job)
        if pid is None:
            return state_of_folder(folder)
        return JobState("running", f"process {pid} on {os.uname().nodename}")

    def stop(self, record: LaunchRecord) -> str:
        """Ask the run to commit and end, and wait until it has."""
        pid = _running_pid(record.job)
        if pid is None:
            return "it was not running on this machine"
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while _running_pid(record.job) is not None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {pid} is still running {STOP_TIMEOUT_S:.0f} s after SIGTERM; kill -9 loses no commit."
                )
            time.sleep(0.1)
        return f"process {pid} committed and ended"


class Local(Torchrun):
    name = "local"

    def plan(self, request: Request, runs: list[RequestedRun]) -> Submission:
        if request.nodes.most > 1:
            raise UserError(f"--on local uses one machine, not --nodes {request.nodes}. Use --on torchrun or slurm.")
        return super().plan(request, runs)

    def device(self, request: Request) -> Device | None:
        return super().device(request) if request.profile.gpu else device_here(request.nproc)


def _start(command: Sequence[str], log: Path) -> str:
    """Start the process; returns PID@START, so that a later process with the same PID is not mistaken for it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    return f"{process.pid}@{_started_at(process.pid)}"


def _running_pid(job: str) -> int | None:
    """The PID of `job` while it runs here. A job without a start time ended before the time could be read."""
    pid, _, started = job.partition("@")
    if not re.fullmatch(r"[1-9][0-9]{0,9}", pid):
        raise UserError(f"launch.json: job={job} is not PID@START. Launch the run again.")
    return int(pid) if started and _started_at(int(pid)) == started else None


def _started_at(pid: int) -> str:
    """When a process started, in the system's own format; empty if it has ended."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        # state, and ticks since boot: proc(5); a zombie has ended
        return "" if fields[0] == "Z" else fields[19]
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True).stdout.split()  # noqa: S607 - as PATH has it
    return "" if not shown or shown[0].startswith("Z") else "-".join(shown[1:])
