"""A real SLURM on this machine: one controller and several node daemons, as any user, without accounting.

Debian's packages are installed if they are missing. Every node is this host under another name and port, so jobs and
signals are real and a node daemon can be killed. All processes are stopped at the end.
"""

import contextlib
import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# PriorityTier: a job of `high` preempts one of `low`, which gets GraceTime seconds to commit
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0
ReturnToService=2
KillWait=10
SlurmdTimeout=20
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=n[0-{last}] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=60
PartitionName=high Nodes=n[0-{last}] PriorityTier=10 PreemptMode=OFF MaxTime=60
"""
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"


class SlurmCluster:
    """`nodes` node daemons named n0, n1, ...; `environment` points every SLURM command at it."""

    def __init__(self, root: Path, *, nodes: int, proctrack: str = "linuxproc") -> None:
        self.root = root
        self.environment = {"SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._names = [f"n{index}" for index in range(nodes)]
        host = socket.gethostname().split(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 CoresPerSocket=4 "
            "RealMemory=4000"
            for name in self._names
        ]
        for folder in ("state", *(f"spool.{name}" for name in self._names)):
            (root / folder).mkdir(parents=True)
        names = {"host": host, "port": free_port(), "user": getpass.getuser(), "root": root, "proctrack": proctrack}
        (root / "slurm.conf").write_text(CONF.format(**names, nodes="\n".join(lines), last=nodes - 1))
        (root / "cgroup.conf").write_text(CGROUP_CONF)
        key = root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def start(self) -> None:
        root, conf = self.root, self.environment["SLURM_CONF"]
        munged = ["munged", "--foreground", "--force", f"--socket={root}/munge.socket", f"--key-file={root}/munge.key"]
        munged += [f"--pid-file={root}/munge.pid", f"--seed-file={root}/munge.seed", f"--log-file={root}/munge.log"]
        self._spawn("munged", munged)
        _wait_for((root / "munge.socket").exists, "munged")
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", conf])
        for name in self._names:
            self.start_node(name)
        self.wait_until_idle()

    def start_node(self, name: str) -> None:
        self._spawn(name, ["slurmd", "-D", "-N", name, "-f", self.environment["SLURM_CONF"]])

    def kill_node(self, name: str, *, with_its_jobs: bool = True) -> None:
        """Simulate a node that loses power: kill its daemon and jobs without notice, or only the daemon."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for pid in self._started_by(name) if with_its_jobs else []:
            _kill(pid)

    def wait_until_idle(self) -> None:
        _wait_for(lambda: self._idle() == len(self._names), f"the nodes; see {self.root}/*.log")

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a SLURM command."""
        return subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=check, timeout=60
        ).stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ... as `scontrol` reports."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        shown = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(part.partition("=")[::2] for part in shown.split()).get(name, "")

    def processes_of(self, job: str, module: str) -> list[int]:
        """PIDs of a job's processes that run `python -m MODULE`."""
        found = [pid for pid in self._started_by() if f"SLURM_JOB_ID={job}" in _environment(pid)]
        return [pid for pid in found if f"-m\0{module}\0" in Path(f"/proc/{pid}/cmdline").read_text()]

    def stop(self) -> None:
        if "slurmctld" in self._daemons:
            self.run("scancel", "--state=RUNNING", "--quiet", check=False)
            self.run("scancel", "--state=PENDING", "--quiet", check=False)
        for pid in self._started_by():
            _kill(pid)
        for daemon in reversed(list(self._daemons.values())):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def _started_by(self, name: str | None = None) -> list[int]:
        """PIDs of the jobs on a node and their step daemons; without `name`, all processes that use this cluster."""
        own = f"SLURM_CONF={self.environment['SLURM_CONF']}"
        found = {pid: variables for pid in _processes() if own in (variables := _environment(pid))}
        if name is None:
            return [pid for pid in found if pid not in (process.pid for process in self._daemons.values())]
        tasks = [pid for pid, variables in found.items() if f"SLURMD_NODENAME={name}" in variables]
        return [*(parent for pid in tasks if (parent := _parent(pid)) in found), *tasks]

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert program, command[0]
        with (self.root / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [program, *command[1:]], stdout=log, stderr=log, preexec_fn=_end_with_parent
            )

    def _idle(self) -> int:
        return self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T", check=False).count("idle")


def install() -> None:
    """Install Debian's packages if they are missing; skip the test if that fails."""
    if all(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in PROGRAMS):
        return
    if not shutil.which("apt-get"):
        pytest.skip("SLURM is not installed, and there is no apt-get to install it")
    apt = [*([] if os.geteuid() == 0 else ["sudo", "-n"]), "apt-get"]
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        done = subprocess.run([*apt, *arguments], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"SLURM is not installed and cannot be installed: {done.stderr[-200:]}")


@contextmanager
def slurm_cluster(root: Path, *, nodes: int = 2, proctrack: str = "linuxproc") -> Iterator[SlurmCluster]:
    install()
    cluster = SlurmCluster(root, nodes=nodes, proctrack=proctrack)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _end_with_parent() -> None:
    """End the daemons with the test session, even if it is killed (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait_for(what: Callable[[], bool], name: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, f"no answer from {name}"
        time.sleep(0.1)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
