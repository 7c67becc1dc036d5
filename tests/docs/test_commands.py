"""Every `bash` block of README and docs/ runs as written, in page order, or carries `<!-- not run: REASON -->`.

Built-in models are replaced by a tiny one; a page's own YAML files (`# NAME.yaml` in the first line) are written first.
Commands for machines that tests lack (SkyPilot, Kubernetes, other nodes) run with --dry-run.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import CLI, ROOT, read_lines
from tests.launcher.slurm_cluster import slurm_cluster

PAGES = sorted(str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
ON_SLURM = "docs/how-to/slurm.md"
QUICK = ("docs/how-to/plan.md", "docs/how-to/spot.md")
"""Pages that train nothing"""
ELSEWHERE = ("--on torchrun", "--on sky", "--on k8s", "--profile")
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
PROGRAMS = {
    "ft-dist": CLI,
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
}


class Page(NamedTuple):
    commands: list[str]
    files: dict[str, str]


def read_page(name: str) -> Page:
    """The commands on a page, and the YAML files that it shows by name."""
    commands, files = [], {}
    for block in BLOCK.finditer((ROOT / name).read_text(encoding="utf-8")):
        lines = block["text"].splitlines()
        if block["language"] == "bash" and not block["reason"]:
            commands += [line for line in lines if line.strip()]
        if block["language"] == "yaml" and (title := re.fullmatch(r"# (\S+\.yaml)", lines[0])):
            files[title[1]] = block["text"].replace("smollm2-135m", "tiny-llama")
    return Page(commands, files)


def with_commands() -> list[str]:
    return [name for name in PAGES if read_page(name).commands]


def run_page(name: str, folder: Path, **environment: str) -> dict[str, str]:
    """Command -> its output. `mine.jsonl` and `held_out.jsonl` are the reader's own data."""
    page = read_page(name)
    for file, text in page.files.items():
        (folder / file).write_text(text)
    for file, source, count in (("mine.jsonl", "train", 24), ("held_out.jsonl", "test", 4)):
        lines = (ROOT / "configs" / "emails" / f"{source}.jsonl").read_text().splitlines(keepends=True)
        (folder / file).write_text("".join(lines[:count]))
    return {command: run(command, folder, **environment) for command in page.commands}


def run(command: str, folder: Path, **environment: str) -> str:
    words = shlex.split(command, comments=True)
    if any(mark in command for mark in ELSEWHERE) and "--dry-run" not in words:
        words.append("--dry-run")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*PROGRAMS[words[0]], *words[1:]],
        cwd=folder,
        env=os.environ | environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.parametrize("name", QUICK)
def test_pages_without_training(name: str, tmp_path: Path) -> None:
    assert all(run_page(name, tmp_path).values())


@pytest.mark.faults
@pytest.mark.parametrize("name", [name for name in with_commands() if name not in (*QUICK, ON_SLURM)])
def test_pages_that_train(name: str, tmp_path: Path) -> None:
    printed = run_page(name, tmp_path)
    if name == "docs/how-to/laptop.md":
        assert '"state": "finished"' in printed["ft-dist status runs/second --json"]
    if name == "docs/how-to/resume.md":
        events = [event["event"] for event in read_lines(tmp_path / "runs" / "again" / "events.jsonl")]
        assert "resume" in events


@pytest.mark.slow
def test_the_slurm_page(tmp_path: Path) -> None:
    with slurm_cluster(tmp_path / "slurm") as cluster:
        printed = run_page(ON_SLURM, tmp_path, **cluster.environment)
    assert "finished" in printed["ft-dist status runs/slurm"]


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(name: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def anchors_of(path: Path) -> list[str]:
    """As GitHub derives them from headings."""
    headings = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_a_block_cannot_escape() -> None:
    """Only `bash` blocks are commands: a block marked as another shell would never run."""
    for name in PAGES:
        languages = re.findall(r"^```(\w+)", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(languages) <= {"bash", "yaml"}, name
