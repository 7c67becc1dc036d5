"""Real runs whose agents and workers are killed: restarted, or completely gone within seconds."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.chaos.storm import workers_of
from tests.conftest import ROOT, SMALL_RUN, read_lines, start_cli
from tests.launcher.processes import end_all, events_of, listening, marked, steps_done, wait_for
from tests.ports import free_port

pytestmark = pytest.mark.faults

GONE_WITHIN_S = 10
STEPS = 30
RUN = [
    *(argument for argument in SMALL_RUN if not argument.startswith(("optim.max_steps", "checkpoint."))),
    f"optim.max_steps={STEPS}",
    "checkpoint.interval_steps=4",
    "method.dropout=0.1",
]
# dropout depends on the rank, so another world size gives other masks
NO_DROPOUT = "method.dropout=0"
# tokenised during training, so every worker has child processes
LIVE = ["data.train=[{path: emails/train.jsonl, live: true}]"]


@pytest.fixture
def mark():
    name = secrets.token_hex(8)
    yield name
    end_all(name)


def reference(tmp_path_factory, *settings: str) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start_cli("train", *RUN, *settings, f"output_dir={folder}", "--nproc", "2")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return reference(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed_without_dropout(tmp_path_factory):
    return reference(tmp_path_factory, NO_DROPOUT)


def same(folder: Path, other: Path, *, bits: bool = True) -> None:
    assert (folder / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    losses = [[line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (folder, other)]
    assert len(losses[0]) == STEPS
    assert losses[0] == (losses[1] if bits else pytest.approx(losses[1], rel=1e-6))


def test_a_killed_worker_is_restarted_and_no_bit_changes(tmp_path, mark, undisturbed):
    folder = tmp_path / "run"
    process = start_cli("train", *RUN, f"output_dir={folder}", "--nproc", "2", FT_DIST_TEST_RUN=mark)
    wait_for(lambda: steps_done(folder) >= 6, [process])
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    assert "rank 1 was killed by SIGKILL" in err
    assert "restart 1 of 3 in 1 s resumes from the commit of step" in err
    (restarted,) = events_of(folder, "restarted")
    assert restarted["count"] == 1
    assert len(events_of(folder, "resume")) == 1
    same(folder, undisturbed)


AS_TRAIN = ["-m", "ft_dist.cli", "train"]
AS_AGENT = ["-m", "ft_dist.launcher.agent"]


@pytest.mark.parametrize("command", [AS_TRAIN, AS_AGENT], ids=["train", "agent"])
def test_a_recipe_edited_during_a_run_changes_nothing(tmp_path, mark, command):
    recipe, folder, elsewhere = tmp_path / "mine.yaml", tmp_path / "run", tmp_path / "elsewhere"
    text = (ROOT / "configs" / "smoke.yaml").read_text()
    arguments = [*RUN[1:], "data.train=emails/train.jsonl", "optim.lr=0.001", "--nproc", "1"]
    tree = yaml.safe_load(text) | {"output_dir": str(folder)}
    recipe.write_text(yaml.safe_dump(tree))
    process = subprocess.Popen(
        [sys.executable, *command, str(recipe), *arguments],
        cwd=ROOT / "configs",
        env=os.environ | {"FT_DIST_TEST_RUN": mark, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: steps_done(folder) >= 6, [process])
    recipe.write_text(yaml.safe_dump(tree | {"output_dir": str(elsewhere)}))
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    wait_for(lambda: len(events_of(folder, "resume")) == 1 and steps_done(folder) >= 12, [process])
    recipe.write_text("model: {path: [")
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    assert len(events_of(folder, "resume")) == 2
    assert steps_done(folder) == STEPS
    assert not elsewhere.exists()
    # started again by hand, the command reads the recipe as it now is
    again = subprocess.run(process.args, cwd=ROOT / "configs", capture_output=True, text=True)
    assert again.returncode == 2
    assert f"{recipe} line 1" in again.stderr


def test_a_hung_run_is_restarted(tmp_path, mark, undisturbed):
    folder = tmp_path / "run"
    settings = [*RUN, "engine.hang_timeout_s=6", f"output_dir={folder}"]
    process = start_cli("train", *settings, "--nproc", "2", FT_DIST_TEST_RUN=mark)
    wait_for(lambda: steps_done(folder) >= 6, [process])
    os.kill(workers_of(process.pid)[1], signal.SIGSTOP)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    assert "made no progress" in events_of(folder, "restarted")[0]["why"]
    same(folder, undisturbed)


def test_a_step_that_always_fails_is_reported_as_a_bug(tmp_path, mark):
    folder = tmp_path / "run"
    explode = ["method.kind=full", "optim.lr=1e30", "optim.max_grad_norm=0", "optim.max_skipped_steps=3"]
    settings = [*SMALL_RUN, *explode, f"output_dir={folder}"]
    process = start_cli("train", *settings, "--nproc", "1", "--max-restarts", "9", FT_DIST_TEST_RUN=mark)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 1, out + err
    assert "failed 3 times in a row after the same commit (the beginning), so the cause is the data or the code" in err
    assert "not finite in 3 steps in a row" in err.splitlines()[-1]
    assert [event["count"] for event in events_of(folder, "restarted")] == [1, 2]


@pytest.mark.parametrize("victim", ["agent", "worker"])
def test_a_killed_run_leaves_no_process_and_the_next_start_resumes(cli, tmp_path, mark, victim):
    folder = tmp_path / "run"
    settings = [*RUN, *LIVE, "optim.epochs=99", f"output_dir={folder}"]
    process = start_cli(
        "train", *settings, "optim.max_steps=9999", "--nproc", "2", "--max-restarts", "0", FT_DIST_TEST_RUN=mark
    )
    wait_for(lambda: len(events_of(folder, "saved")) >= 1, [process])
    workers = workers_of(process.pid)
    # an agent, two ranks, their tokenising processes, the guard
    assert len(marked(mark)) >= 6
    os.kill(workers[1] if victim == "worker" else process.pid, signal.SIGKILL)
    deadline = time.monotonic() + GONE_WITHIN_S
    while left := marked(mark):
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.05)
    process.communicate()
    if victim == "agent":
        resumed = cli("train", *settings, f"optim.max_steps={steps_done(folder) + 2}", "--nproc", "1")
        assert resumed.returncode == 0, resumed.stderr
        assert "resumed from step" in resumed.stdout


def start_agent(name: str, port: int, mark: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "ft_dist.launcher.agent", "--rdzv", f"127.0.0.1:{port}", "--nproc", "1", *arguments],
        cwd=ROOT,
        env=os.environ | {"FT_DIST_NODE": name, "FT_DIST_TEST_RUN": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_agent_shrinks_the_world_and_a_new_one_grows_it(tmp_path, mark, undisturbed_without_dropout):
    folder = tmp_path / "run"
    settings = [*RUN, NO_DROPOUT, f"output_dir={folder}", "--nnodes", "1:2"]
    port = free_port()
    head = start_agent("first", port, mark, *settings)
    wait_for(lambda: listening(port), [head])
    second = start_agent("second", port, mark, *settings)
    wait_for(lambda: steps_done(folder) >= 6, [head, second])
    second.kill()
    second.communicate()
    wait_for(lambda: len(events_of(folder, "resume")) >= 1, [head])
    third = start_agent("third", port, mark, *settings)
    out, err = head.communicate(timeout=900)
    assert head.returncode == 0, out + err
    third.communicate(timeout=900)
    assert "second is lost" in err
    assert "the world has 1 node and 1 rank: 2 were requested" in err
    assert [event["world_size"] for event in events_of(folder, "world")][:1] == [1]
    same(folder, undisturbed_without_dropout, bits=False)


def test_preempting_one_of_two_nodes_ends_both_with_75(tmp_path, mark):
    folder = tmp_path / "run"
    settings = [*RUN, f"output_dir={folder}", "--nnodes", "2", "optim.max_steps=9999", "optim.epochs=999"]
    port = free_port()
    agents = [start_agent(name, port, mark, *settings) for name in ("first", "second")]
    wait_for(lambda: steps_done(folder) >= 3, agents)
    agents[1].send_signal(signal.SIGUSR1)
    for agent in agents:
        out, err = agent.communicate(timeout=900)
        assert agent.returncode == 75, out + err
    assert read_lines(folder / "events.jsonl")[-1]["event"] == "preempted"
    assert marked(mark) == []


def test_agents_of_different_runs_are_refused(tmp_path, mark):
    port = free_port()
    settings = [*RUN, f"output_dir={tmp_path / 'run'}", "--nnodes", "2"]
    head = start_agent("first", port, mark, *settings)
    wait_for(lambda: listening(port), [head])
    for others in (["--run-id", "another"], ["seed=7"]):
        stranger = start_agent("other", port, mark, *settings, *others)
        _, err = stranger.communicate(timeout=900)
        assert stranger.returncode == 2
        what = "run is another, but" if others[0] == "--run-id" else "the resolved config is"
        assert f"refused: other: {what}" in err
    # no worker has started: a signal ends the waiting head
    head.send_signal(signal.SIGTERM)
    head.communicate(timeout=60)
    assert head.returncode == 75
    assert marked(mark) == []


def test_missing_nodes_of_a_fixed_world_are_reported_after_the_timeout(tmp_path, mark):
    settings = [*RUN, f"output_dir={tmp_path / 'run'}", "--nnodes", "3", "--join-timeout", "2"]
    head = start_agent("first", free_port(), mark, *settings)
    _, err = head.communicate(timeout=900)
    assert head.returncode == 1
    assert "error: 1 of 3 nodes joined (first), 2 missing within 2 s." in err
    assert not (tmp_path / "run").exists()


def test_a_port_used_by_another_program_is_reported(tmp_path, mark):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = [*RUN, f"output_dir={tmp_path / 'run'}", "--nnodes", "2", "--join-timeout", "4"]
        agent = start_agent("first", port, mark, *settings)
        out, err = agent.communicate(timeout=900)
    assert agent.returncode == 1, out + err
    assert f"first could not reach the head at 127.0.0.1:{port} within 4 s" in err
    assert "another program may be listening" in err
