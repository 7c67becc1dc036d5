"""Two real ranks of `ft-dist check --env`, one of them with a fault."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from ft_dist.config import load_config
from ft_dist.errors import PreflightError
from ft_dist.preflight.ranks import Preflight
from tests.conftest import ROOT
from tests.ports import free_port

pytestmark = pytest.mark.faults


@pytest.fixture
def port():
    return free_port()


def rank(number: int, port: int, *arguments: str, cwd: Path = ROOT, **environment: str) -> "subprocess.Popen[str]":
    world = {
        "RANK": str(number),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_WORLD_SIZE": "2",
    }
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FT_DIST_NODE": f"host{number}"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-m", "ft_dist.preflight", "smoke", *arguments],
        cwd=cwd,
        env=os.environ | world | place | {"PYTHONPATH": paths} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(*ranks: "subprocess.Popen[str]") -> tuple[list[int], str]:
    """Exit codes, and everything the ranks printed."""
    outputs = [process.communicate(timeout=900) for process in ranks]
    return [process.returncode for process in ranks], "".join(out + err for out, err in outputs)


def test_two_matching_ranks(port, tmp_path):
    codes, text = results(*(rank(number, port, f"output_dir={tmp_path / 'run'}") for number in range(2)))
    # other work on the machine may slow one of them
    problems = [
        line for line in text.splitlines() if line.startswith("problem") and "for work that takes others" not in line
    ]
    assert problems == []
    assert codes[0] == codes[1]
    assert "preflight: 2 ranks agree; all-reduce" in text
    assert not (tmp_path / "run").exists()


def test_another_version_on_one_node(port, tmp_path):
    record = tmp_path / "elsewhere" / "peft-9.9.9.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.9.9\n")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(record.parent)])
    output = f"output_dir={tmp_path / 'run'}"
    codes, text = results(rank(0, port, output), rank(1, port, output, PYTHONPATH=paths))
    assert codes == [2, 2]
    assert "problem: host1: peft is 9.9.9, but" in text


def test_other_code_on_one_node(port, tmp_path):
    """And another config: an override that one node lacks."""
    copy = tmp_path / "copy"
    for name in ("ft_dist", "kernels", "configs"):
        shutil.copytree(ROOT / name, copy / name)
    with (copy / "ft_dist" / "objective" / "causal.py").open("a") as file:
        file.write("# changed\n")
    output = f"output_dir={tmp_path / 'run'}"
    changed = rank(1, port, output, "seed=7", cwd=copy, PYTHONPATH=os.pathsep.join([str(copy), str(copy / "kernels")]))
    codes, text = results(rank(0, port, output), changed)
    assert codes == [2, 2]
    assert "problem: host1: ft_dist's source is" in text
    assert "problem: host1: the resolved config is" in text


def test_an_output_dir_that_one_node_does_not_share(port, tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    codes, text = results(*(rank(number, port, "output_dir=run", cwd=place) for number, place in enumerate(places)))
    assert codes == [2, 2]
    assert "problem: host1: output_dir=run does not show what rank 0 writes there" in text


def test_an_interface_that_is_not_there(port, tmp_path):
    codes, text = results(rank(1, port, f"output_dir={tmp_path / 'run'}", GLOO_SOCKET_IFNAME="ib7"))
    assert codes == [2]
    assert "host1: GLOO_SOCKET_IFNAME=ib7 is not a network interface of this machine (lo" in text


def test_a_port_in_use(tmp_path):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        codes, text = results(rank(0, port, f"output_dir={tmp_path / 'run'}"))
    # the next start gets another port: nothing for the user to fix
    assert codes == [1]
    assert f"MASTER_PORT={port} is in use by another program" in text


def test_a_wrong_world_size(port, tmp_path):
    output = f"output_dir={tmp_path / 'run'}"
    codes, text = results(rank(0, port, output), rank(1, port, output, WORLD_SIZE="3"))
    assert codes == [2, 2]
    assert "problem: host1: world_size is 3, but 2 on host0" in text


def test_a_rank_that_never_joins(tmp_path):
    config = load_config("smoke", [f"output_dir={tmp_path / 'run'}"])
    preflight = Preflight(config, dist.HashStore(), rank=0, size=3, timeout_s=1, say=print)
    with pytest.raises(PreflightError, match=r"WORLD_SIZE=3, but ranks \[1, 2\] did not join within 1 s"):
        preflight.compare()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_slow_rank(port, tmp_path):
    """Rank 1 gets a twentieth of its time once it waits for rank 0."""
    output = f"output_dir={tmp_path / 'run'}"
    slow = rank(1, port, output)
    wait_until_idle(slow)
    over = threading.Event()
    throttle = threading.Thread(target=throttled, args=(slow, over))
    throttle.start()
    try:
        codes, text = results(rank(0, port, output), slow)
    finally:
        over.set()
        throttle.join()
    assert codes == [2, 2]
    assert "problem: host1: rank 1 took" in text
    assert "host0: rank 0 took" not in text


def throttled(process: "subprocess.Popen[str]", over: threading.Event) -> None:
    while not over.is_set() and process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.04)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.002)


def wait_until_idle(process: "subprocess.Popen[str]", still_s: float = 3.0) -> None:
    """Wait until it has imported everything and is idle."""
    used, since = -1, time.monotonic()
    while time.monotonic() - since < still_s:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = (int(fields[11]) + int(fields[12])) // 5
        if ticks != used or ticks < 20:
            used, since = ticks, time.monotonic()
        time.sleep(0.1)
