"""Three hosts, one rank each: links cut, repaired, slow and stalled. The samples equal those of an undisturbed run."""

import secrets
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import CLI, ROOT, SMALL_RUN, read_lines
from tests.launcher.elastic.hosts import Hosts, usable
from tests.launcher.processes import end_all, events_of, steps_done, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not usable(), reason="creating network namespaces needs root")]

RUN = [
    *(argument for argument in SMALL_RUN if not argument.startswith(("optim.max_steps", "checkpoint."))),
    "checkpoint.interval_steps=20",
    "optim.epochs=99",
]
MOST_STEPS = 600


@pytest.fixture
def mark():
    name = secrets.token_hex(8)
    yield name
    end_all(name)


@pytest.fixture
def hosts():
    with Hosts(3) as hosts:
        yield hosts


def start(hosts: Hosts, number: int, folder: Path, mark: str, steps: int, nodes: str):
    options = ["--nnodes", nodes, "--nproc", "1", "--rdzv", f"{hosts.address(1)}:29400"]
    settings = [*RUN, f"optim.max_steps={steps}", f"output_dir={folder}"]
    return hosts.start(number, "-m", "ft_dist.launcher.agent", *options, *settings, FT_DIST_TEST_RUN=mark)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[str]:
    """The samples of an undisturbed run, one line per step, with as many steps as the longest other run."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    settings = [*RUN, f"optim.max_steps={MOST_STEPS}", f"output_dir={folder}", "--nproc", "1"]
    subprocess.run([*CLI, "train", *settings], cwd=ROOT, check=True, capture_output=True)
    return (folder / "samples.jsonl").read_text().splitlines()


def samples(folder: Path) -> list[str]:
    return (folder / "samples.jsonl").read_text().splitlines()


def ended(process) -> str:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    return err


def test_a_host_whose_link_is_cut_leaves_until_the_link_is_repaired(hosts, mark, undisturbed, tmp_path):
    folder, steps = tmp_path / "run", MOST_STEPS
    agents = [start(hosts, number, folder, mark, steps, "2:3") for number in (1, 2, 3)]
    wait_for(lambda: steps_done(folder) >= 25, agents)
    hosts.cut(3)
    wait_for(lambda: [event["world_size"] for event in events_of(folder, "resume")] == [2], agents)
    hosts.repair(3)
    consoles = [ended(agent) for agent in agents]
    assert "host3 is lost: it was silent for" in consoles[0]
    assert "the world has 2 nodes and 2 ranks: 3 were requested" in consoles[0]
    assert "host3 lost the head" in consoles[2]
    assert [event["world_size"] for event in events_of(folder, "resume")] == [2, 3]
    assert [event["why"] for event in events_of(folder, "restarted")] == ["host3 lost", "host3 joined the world"]
    # it grew after a committed step, so no step ran twice
    grown_at = events_of(folder, "resume")[1]["step"]
    assert events_of(folder, "preempted")[0]["step"] == grown_at
    assert samples(folder) == undisturbed[:steps]


def test_a_link_cut_for_seconds_causes_no_restart(hosts, mark, undisturbed, tmp_path):
    folder, steps = tmp_path / "run", 300
    agents = [start(hosts, number, folder, mark, steps, "3") for number in (1, 2, 3)]
    wait_for(lambda: steps_done(folder) >= 25, agents)
    hosts.cut(2)
    time.sleep(5)
    hosts.repair(2)
    for agent in agents:
        ended(agent)
    assert events_of(folder, "restarted") == []
    assert samples(folder) == undisturbed[:steps]


def test_a_slow_link_that_stalls_for_seconds_causes_no_restart(hosts, mark, undisturbed, tmp_path):
    folder, steps = tmp_path / "run", 60
    link = hosts.slow_down(3, 0.05)
    agents = [start(hosts, number, folder, mark, steps, "3") for number in (1, 2, 3)]
    for until in (5, 15, 25):
        wait_for(lambda until=until: steps_done(folder) >= until, agents)
        link.send_signal(signal.SIGSTOP)
        time.sleep(6)
        link.send_signal(signal.SIGCONT)
    for agent in agents:
        ended(agent)
    assert events_of(folder, "restarted") == []
    # a step needs several round trips of 100 ms, which shows that the link was slow
    assert min(line["step_s"] for line in read_lines(folder / "metrics.jsonl")) > 0.1
    assert samples(folder) == undisturbed[:steps]
