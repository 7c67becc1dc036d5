"""On this machine: the node agent in the background, alone (`local`) or as one node of several (`torchrun`).

`torchrun` takes torchrun's arguments: start the same command on every node, with one of them as HOST:PORT.
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
from ft_dist.launcher.record import JobState, Record, by_folder, new_record
from ft_dist.launcher.request import Request, Run
from ft_dist.launcher.submission import Submission
from ft_dist.launcher.targets.render import render

STOP_TIMEOUT_S = 600.0


def plan(request: Request, runs: list[Run]) -> Submission:
    """One shell script that is one node of the run. Raises UserError for a sweep or a rendezvous that is missing."""
    if len(runs) > 1:
        raise UserError(f"--sweep needs --on slurm, where each run is a job of its own; here are {len(runs)}.")
    if request.nodes.most > 1 and request.target == "local":
        raise UserError(f"--on local is one machine, not --nodes {request.nodes}. Use --on torchrun or slurm.")
    if request.nodes.most > 1 and not re.fullmatch(r"[^\s:]+:\d+|\[[^\s]+\]:\d+", request.rdzv or ""):
        raise UserError(
            f"--rdzv {request.rdzv or '(not given)'}: --nodes {request.nodes} needs HOST:PORT of the first node, the "
            "same on every node, for example --rdzv 10.0.0.1:29500."
        )
    if request.profile.container:
        raise UserError(f"profile.container={request.profile.container}: start this command inside it instead.")
    run = runs[0]
    host = re.sub(r"[^\w.-]", "-", os.uname().nodename)
    suffix = "" if request.nodes.most == 1 else f"-{host}"
    script, log = run.folder / "launch" / f"node{suffix}.sh", run.folder / "logs" / f"launch{suffix}.log"
    text = render(
        "node.sh.j2",
        **request.values,
        rdzv=request.rdzv if request.nodes.most > 1 else None,
        run_id=run.folder.name,
        config=str(run.pinned),
        folder_of_work=os.getcwd(),
    )
    return Submission(
        target=request.target,
        runs=runs,
        script=script,
        files={script: text, run.pinned: dump_config(run.config)},
        command=["bash", str(script)],
        logs=[log],
    )


def submit(submission: Submission) -> list[Record]:
    log = submission.logs[0]
    assert log is not None
    job = _start(submission.command, log)
    return [new_record(target=submission.target, job=job, command=submission.command, log=log)]


def submit_again(record: Record, folder: Path) -> str:
    return _start(record.command, Path(str(record.log)))


def state(record: Record, folder: Path) -> JobState:
    pid = _alive(record.job)
    return by_folder(folder) if pid is None else JobState("running", f"process {pid} on {os.uname().nodename}")


def stop(record: Record) -> str:
    """Ask the run to commit and leave, and wait until it has."""
    pid = _alive(record.job)
    if pid is None:
        return "it was not running on this machine"
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _alive(record.job) is not None:
        if time.monotonic() > deadline:
            raise UserError(
                f"process {pid} still runs {STOP_TIMEOUT_S:.0f} s after SIGTERM; kill -9 {pid} loses no commit."
            )
        time.sleep(0.1)
    return f"process {pid} committed and left"


def _start(command: Sequence[str], log: Path) -> str:
    """The process, named so that a later one of the same number is not taken for it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    return f"{process.pid}@{_started_at(process.pid)}"


def _alive(job: str) -> int | None:
    """The process number of `job` while it runs here; a job without a start had ended before it could be asked."""
    pid, _, started = job.partition("@")
    return int(pid) if started and _started_at(int(pid)) == started else None


def _started_at(pid: int) -> str:
    """When a process started, in the system's own words; empty if it has ended."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        # state, and ticks since boot: proc(5); a zombie has ended
        return "" if fields[0] == "Z" else fields[19]
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True).stdout.split()
    return "" if not shown or shown[0].startswith("Z") else "-".join(shown[1:])
