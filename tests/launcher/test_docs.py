"""Every command of docs/launch runs as it stands; on what is not here (SkyPilot, Kubernetes, GPUs) with --dry-run."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import CLI, ROOT
from tests.slurm_cluster import slurm_cluster

PAGES = ROOT / "docs" / "launch"
ELSEWHERE = ("--on torchrun", "--on sky", "--on k8s", "--profile")


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (PAGES / page).read_text(), flags=re.DOTALL)
    found = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert found
    return found


def run(command: str, folder: Path, **environment: str) -> str:
    words = shlex.split(command)
    assert words[0] == "ft-dist", command
    if any(mark in command for mark in ELSEWHERE) and "--dry-run" not in words:
        words.append("--dry-run")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*CLI, *words[1:]],
        cwd=folder,
        env=os.environ | environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def test_the_page_on_spot_machines(tmp_path):
    for command in commands("spot.md"):
        assert run(command, tmp_path)
    assert (tmp_path / "runs" / "vm" / "launch" / "ft-vm.service").exists()


@pytest.mark.faults
@pytest.mark.parametrize("page", ["laptop.md", "node.md"])
def test_the_pages_on_this_machine(tmp_path, page):
    told = {command: run(command, tmp_path) for command in commands(page)}
    if page == "laptop.md":
        assert '"state": "finished"' in told["ft-dist status runs/second --json"]


@pytest.mark.slow
def test_the_page_on_slurm(tmp_path):
    with slurm_cluster(tmp_path / "slurm") as cluster:
        told = {command: run(command, tmp_path, **cluster.environment) for command in commands("slurm.md")}
    assert "finished" in told["ft-dist status runs/slurm"]


def test_every_page_is_tested():
    assert sorted(page.name for page in PAGES.glob("*.md")) == ["laptop.md", "node.md", "slurm.md", "spot.md"]
