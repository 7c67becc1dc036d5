"""The wheel holds every package and every data file. `make wheel` installs it into an empty environment and trains."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOT_SHIPPED = {"configs/emails/generate.py", "configs/emails/templates.yaml"}
"""Generates the example e-mails; used only in this repository"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel built from a copy of the tracked files, without leftovers of old builds."""
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in tracked(""):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def tracked(folder: str) -> list[str]:
    """Files below `folder` that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", folder or "."]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in names if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


def test_every_module_is_in_the_wheel(wheel: list[str]) -> None:
    modules = {name for name in tracked("ft_dist") if name.endswith(".py")}
    modules |= {name.removeprefix("kernels/") for name in tracked("kernels") if name.endswith(".py")}
    assert modules == {name for name in wheel if name.endswith(".py")}


def test_every_data_file_is_in_the_wheel(wheel: list[str]) -> None:
    data = {
        f"ft_dist/{name}" for folder in ("configs", "launch") for name in tracked(folder) if name not in NOT_SHIPPED
    }
    data |= {name for name in tracked("ft_dist") if not name.endswith(".py")}
    packaged = {name for name in wheel if not name.endswith(".py") and ".dist-info/" not in name}
    assert data == packaged


def test_packages_have_an_init(wheel: list[str]) -> None:
    """A folder of modules without one is silently left out of the wheel."""
    folders = {str(Path(name).parent) for name in wheel if name.endswith(".py")}
    assert all(f"{folder}/__init__.py" in wheel for folder in folders)
