"""A stranger who reaches every port of a run on two nodes, for the length of the run."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from tests.conftest import ROOT, SMALL_RUN, read_lines
from tests.launcher.processes import end_all, events_of, wait_for
from tests.ports import free_port

pytestmark = pytest.mark.faults

STEPS = 120
QUIET_STEPS = 60
"""The last ones: nobody has joined for a while"""
RUN = [
    *(argument for argument in SMALL_RUN if not argument.startswith(("optim.max_steps", "checkpoint."))),
    f"optim.max_steps={STEPS}",
    "optim.epochs=99",
    "checkpoint.interval_steps=10",
    "checkpoint.keep=99",
]


@pytest.fixture
def mark():
    name = secrets.token_hex(8)
    yield name
    end_all(name)


def run(folder: Path, mark: str, *, attacked: bool) -> list[str]:
    """Train on two nodes; returns the stranger's reports. No process may show the secret in its command line."""
    port = free_port()
    # the stranger has its own machine
    *run_cores, stranger_core = map(str, sorted(os.sched_getaffinity(0)))
    cores = ",".join(run_cores or [stranger_core])
    environment = {name: value for name, value in os.environ.items() if name != "FT_DIST_SECRET"}
    options = ["--rdzv", f"127.0.0.1:{port}", "--nproc", "1", "--nnodes", "2"]
    attack = [sys.executable, "-m", "tests.launcher.elastic.attack", mark, *([] if attacked else ["decoy"])]
    agent = [sys.executable, "-m", "ft_dist.launcher.agent", *options, *RUN, f"output_dir={folder}"]
    report = folder.with_suffix(".reports")
    with report.open("w") as output:
        stranger = subprocess.Popen(["taskset", "-c", stranger_core, *attack], cwd=ROOT, stdout=output, env=environment)
    agents = [
        subprocess.Popen(
            ["taskset", "-c", cores, *agent],
            cwd=ROOT,
            env=environment | {"FT_DIST_NODE": name, "FT_DIST_TEST_RUN": mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("first", "second")
    ]
    wait_for(lambda: (folder / "launch" / "secret").exists(), agents)
    secret = (folder / "launch" / "secret").read_text()
    ended = [agent.communicate(timeout=900) for agent in agents]
    assert stranger.poll() is None, "it gave up"
    stranger.kill()
    stranger.wait()
    assert [agent.returncode for agent in agents] == [0, 0], ended
    assert len(secret) == 64
    assert not (folder / "launch" / "secret").exists()
    for path in folder.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path
    assert all(secret not in text for pair in ended for text in pair)
    return report.read_text().splitlines()[:-1]  # the last may be incomplete


def test_a_stranger_can_neither_end_nor_join_nor_read_a_run(tmp_path, mark):
    calm, attacked = tmp_path / "calm", tmp_path / "attacked"
    run(calm, mark, attacked=False)
    reports = [json.loads(line) for line in run(attacked, mark, attacked=True)]
    assert max(report["sent"] for report in reports) > 200
    assert max(len(report["ports"]) for report in reports) >= 4, "the rendezvous, the store, and gloo's"
    ports = {port for report in reports for port in report["ports"]}
    assert all(port.startswith("127.0.0.1:") for port in ports), ports
    heard = b"".join(bytes.fromhex(data) for data in reports[-1]["heard"].values())
    for word in (b"ft_dist", b"output", str(tmp_path).encode(), b"rank", b"refused"):
        assert word not in heard
    lines, undisturbed = (read_lines(folder / "metrics.jsonl") for folder in (attacked, calm))
    assert [line["loss"] for line in lines] == [line["loss"] for line in undisturbed]
    assert len(lines) == STEPS
    assert [event["step"] for event in events_of(attacked, "saved")] == list(range(10, STEPS + 1, 10))
    assert events_of(attacked, "restarted") == events_of(attacked, "save_failed") == []
    ratio = median(line["step_s"] for line in lines[-QUIET_STEPS:]) / median(
        line["step_s"] for line in undisturbed[-QUIET_STEPS:]
    )
    print(f"median step under attack: {ratio:.3f} of the undisturbed one")
