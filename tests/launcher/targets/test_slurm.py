"""Jobs on a real SLURM that are signalled, time out, are preempted or requeued, or lose a node. Each one finishes
unattended, with the samples and losses of an undisturbed run."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import CLI, SMALL_RUN, read_lines, start_cli
from tests.launcher.processes import steps_done, wait_for
from tests.launcher.slurm_cluster import SlurmCluster, slurm_cluster

# about 40 s of steps on a slow core, so that every fault occurs during training
RUN = [*SMALL_RUN, "optim.max_steps=60", "optim.epochs=5", "checkpoint.interval_steps=10", "evaluate.before=false"]
TIMEOUT_S = 600


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The run on one machine with the same number of ranks, and therefore the same bits."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = subprocess.run([*CLI, "train", *RUN, f"output_dir={folder}", "--nproc", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module", params=["linuxproc"])
def cluster(request, tmp_path_factory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), nodes=3, proctrack=request.param) as running:
        yield running


class Launched:
    """`ft-dist launch --on slurm` of a run on two nodes, following its log."""

    def __init__(self, cluster: SlurmCluster, folder: Path, *arguments: str) -> None:
        self.cluster, self.folder = cluster, folder
        options = ["--on", "slurm", "--nodes", "2", "--gpus-per-node", "0"]
        self.process = start_cli("launch", *RUN, f"output_dir={folder}", *options, *arguments, **cluster.environment)

    @property
    def job(self) -> str:
        return str(json.loads((self.folder / "launch.json").read_text())["job"])

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: steps_done(self.folder) >= step)

    def finish(self) -> str:
        """Wait until the run has finished; returns its console."""
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode == 0, out + err
        assert self.cluster.state(self.job) == "COMPLETED"
        return out + err

    def wait_until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not what():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, (self.folder / "logs" / "slurm.log").read_text()
            time.sleep(0.1)


@contextmanager
def stopped(cluster: SlurmCluster, job: str) -> Iterator[None]:
    """Stop the workers, so that slow actions of SLURM occur during training on any machine."""
    workers = cluster.processes_of(job, "ft_dist.train")
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def same(folder: Path, undisturbed: Path) -> bool:
    """True if every step ran once, with the samples and the loss of the undisturbed run."""

    def steps(run: Path) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in read_lines(run / "metrics.jsonl")]

    samples = (folder / "samples.jsonl").read_text() == (undisturbed / "samples.jsonl").read_text()
    return samples and steps(folder) == steps(undisturbed)


def events(folder: Path) -> list[str]:
    return [line["event"] for line in read_lines(folder / "events.jsonl")]


@pytest.mark.faults
def test_a_signalled_job_commits_requeues_itself_and_finishes(cli, cluster, undisturbed, tmp_path):
    run = Launched(cluster, tmp_path / "run")
    run.wait_for_step(3)
    cluster.run("scancel", "--signal=USR1", "--batch", run.job)
    console = run.finish()
    assert "exited with 75" in console
    assert "requeued 1 times" in console
    assert events(run.folder).count("preempted") == 1
    assert same(run.folder, undisturbed)
    status = cli("status", str(run.folder), "--json", **cluster.environment)
    shown = json.loads(status.stdout)
    assert (shown["state"], shown["step"], shown["commit"], shown["job"]) == ("finished", 60, 60, run.job)


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["linuxproc", "cgroup"], indirect=True)
@pytest.mark.parametrize("fault", ["signalled", "requeued", "preempted", "node lost", "daemon killed"])
def test_no_fault_of_the_job_changes_the_run(cluster, undisturbed, tmp_path, fault):
    run = Launched(cluster, tmp_path / "run")
    run.wait_for_step(15)
    if fault == "signalled":
        cluster.run("scancel", "--signal=USR1", "--batch", run.job)
    elif fault == "requeued":
        cluster.run("scontrol", "requeue", run.job)
    elif fault == "preempted":
        cluster.run("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    else:
        node = cluster.field(run.job, "NodeList").replace("n[", "").split("-")[-1].rstrip("]").split(",")[-1]
        with stopped(cluster, run.job):
            cluster.kill_node(f"n{node}", with_its_jobs=fault == "node lost")
            run.wait_until(lambda: cluster.state(run.job) != "RUNNING")
    console = run.finish()
    assert "requeued" in console
    assert same(run.folder, undisturbed)
    if fault in ("node lost", "daemon killed"):
        cluster.start_node(f"n{node}")
        cluster.wait_until_idle()


@pytest.mark.slow
def test_the_time_limit_ends_in_a_commit_and_a_requeue(cluster, undisturbed, tmp_path):
    profile = tmp_path / "cluster.yaml"
    profile.write_text("slurm: {time: '4'}\n")
    run = Launched(cluster, tmp_path / "run", "--profile", str(profile), "preemption.margin_s=40")
    run.wait_for_step(3)
    # SLURM signals 40 to 100 s before the limit
    with stopped(cluster, run.job):
        end = time.mktime(time.strptime(cluster.field(run.job, "EndTime"), "%Y-%m-%dT%H:%M:%S"))
        time.sleep(max(0.0, end - 35 - time.time()))
    console = run.finish()
    assert "exited with 75" in console
    assert events(run.folder).count("preempted") == 1
    assert same(run.folder, undisturbed)


@pytest.mark.slow
def test_each_task_of_a_sweep_requeues_independently(cli, cluster, undisturbed, tmp_path):
    options = ["--on", "slurm", "--gpus-per-node", "0", "--nproc", "2", "--sweep", "optim.lr=1e-3,2e-3", "--json"]
    done = cli("launch", *RUN, f"output_dir={tmp_path / 'sweep'}", *options, **cluster.environment)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    array = first["job"].removesuffix("_0")
    assert second["job"] == f"{array}_1"
    wait_for(lambda: steps_done(Path(first["run"])) >= 3, [])
    cluster.run("scancel", "--signal=USR1", "--batch", first["job"])
    for task in (first, second):
        followed = cli("logs", task["run"], **cluster.environment)
        assert followed.returncode == 0, followed.stdout + followed.stderr
        assert cluster.state(task["job"]) == "COMPLETED"
    assert [cluster.field(task["job"], "Restarts") for task in (first, second)] == ["1", "0"]
    # 1e-3 is the recipe's learning rate
    assert same(Path(first["run"]), undisturbed)
    other = Path(second["run"])
    assert (other / "samples.jsonl").read_text() == (undisturbed / "samples.jsonl").read_text()
    assert [line["lr"] for line in read_lines(other / "metrics.jsonl")] == [
        2 * line["lr"] for line in read_lines(undisturbed / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_stop_commits_without_requeueing_and_resume_continues(cli, cluster, undisturbed, tmp_path):
    run = Launched(cluster, tmp_path / "run")
    run.wait_for_step(2)
    options = [f"output_dir={run.folder}", "--on", "slurm", "--gpus-per-node", "0"]
    with stopped(cluster, run.job):
        again = cli("launch", *RUN, *options, **cluster.environment)
        stop = cli("stop", str(run.folder), **cluster.environment)
    assert again.returncode == 2
    assert f"job {run.job} of slurm is already active" in again.stderr
    assert stop.returncode == 0, stop.stderr
    out, err = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 75, out + err
    assert cluster.state(run.job) == "COMPLETED"
    resumed = cli("resume", str(run.folder), **cluster.environment)
    assert resumed.returncode == 0, resumed.stderr
    followed = cli("logs", str(run.folder), **cluster.environment)
    assert followed.returncode == 0, followed.stderr
    assert same(run.folder, undisturbed)


@pytest.mark.faults
def test_a_job_that_never_commits_is_not_requeued_forever(cluster, tmp_path):
    # exits with 75 at every start, before any commit
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/bash\nexit 75\n")
    python.chmod(0o755)
    profile = tmp_path / "cluster.yaml"
    profile.write_text(f"venv: {tmp_path}/venv\nslurm: {{max_idle_requeues: 1}}\n")
    run = Launched(cluster, tmp_path / "run", "--profile", str(profile))
    out, err = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 1, out + err
    assert "no new commit in 2 starts: giving up" in out
    assert cluster.field(run.job, "Restarts") == "2"
