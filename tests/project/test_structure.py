"""Rules that no other tool checks: sizes of files and folders, which files name a method, plain words."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT

CODE = ("ft_dist", "kernels")
MOST_LINES, MOST_FILES, MOST_OLD_WORDS = 400, 12, 19
DATA = (".gz", ".zstd", ".mds", "index.json")
"""Binary sets that tests read, with their index"""
OLD_WORDS = re.compile(r"\b(anew|alike|told|goes on)\b", re.IGNORECASE)
METHOD_BY_NAME = re.compile(r"kind == .lora|job\.lora")


def tracked(*folders: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in names if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


def lines_of(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def test_no_folder_is_crowded() -> None:
    names = [name for name in tracked(".") if not name.endswith(DATA) and not name.startswith("benchmarks/results/")]
    folders = Counter(str(Path(name).parent) for name in names)
    assert {folder: count for folder, count in folders.items() if count > MOST_FILES} == {}


def test_no_product_file_is_long() -> None:
    lengths = {name: len(lines_of(name)) for name in tracked(*CODE) if name.endswith(".py")}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_only_method_and_config_name_a_method() -> None:
    """Everything else asks the protocol in ft_dist/method."""
    names = [name for name in tracked(*CODE) if not name.startswith(("ft_dist/method/", "ft_dist/config/"))]
    named = [
        f"{name}:{number}"
        for name in names
        for number, line in enumerate(lines_of(name), 1)
        if METHOD_BY_NAME.search(line)
    ]
    assert named == []


def test_the_readme_is_short() -> None:
    assert len(lines_of("README.md")) < 150


def test_old_words_stay_rare() -> None:
    names = tracked(*CODE) + [name for name in tracked(".") if name.endswith(".md")]
    found = [
        f"{name}:{number}"
        for name in set(names)
        for number, line in enumerate(lines_of(name), 1)
        if OLD_WORDS.search(line)
    ]
    assert len(found) <= MOST_OLD_WORDS, found
