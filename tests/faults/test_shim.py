"""The shim fails exactly the calls that its rules name, in Python and in what Python calls."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.shim import Rule, Shim

CALLS = """
import json, mmap, os, shutil, sys, time
os.chdir(sys.argv[1])

def outcome(call):
    try:
        call()
    except OSError as error:
        return error.errno
    return 0

def append(name):
    with open(name, "ab", buffering=0) as file:
        return file.write(b"1234")

def mapped(name):
    with open(name, "rb") as file:
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

def synced(name):
    with open(name, "rb") as file:
        os.fsync(file.fileno())

calls = {
    "open": lambda: open("old").close(),
    "create": lambda: open("new", "w").close(),
    "read": lambda: open("old").read(),
    "write": lambda: append("log"),
    "fsync": lambda: synced("old"),
    "rename": lambda: os.replace("old", "moved"),
    "link": lambda: os.link("old", "linked"),
    "unlink": lambda: shutil.rmtree("tree"),
    "mkdir": lambda: os.mkdir("folder"),
    "truncate": lambda: os.truncate(os.open("log", os.O_RDWR), 0),
    "stat": lambda: os.stat("old"),
    "list": lambda: os.listdir("tree"),
    "mmap": lambda: mapped("old"),
}
found = {name: outcome(calls[name]) for name in sys.argv[2:]}
print(json.dumps(found | {"free": shutil.disk_usage(".").free, "time": time.time(), "wrote": append("short")}))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    for name in ("old", "log", "tree/inner/file"):
        (tmp_path / name).write_text("content")
    return tmp_path


def play(place: Path, rules: list[Rule], *calls: str, rank: str = "0") -> tuple[dict[str, float], Shim]:
    shim = Shim(place, rules)
    command = [sys.executable, "-c", CALLS, str(place), *calls]
    environment = os.environ | shim.environment | {"RANK": rank}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), shim


pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
GROUPS = [
    "open",
    "create",
    "read",
    "write",
    "fsync",
    "rename",
    "link",
    "unlink",
    "mkdir",
    "truncate",
    "stat",
    "list",
    "mmap",
]
NAMES = {"create": "*/new", "write": "*/log", "truncate": "*/log", "mkdir": "*/folder", "unlink": "*/tree/inner/file"}


@pytest.mark.parametrize(
    "call",
    [
        "open",
        "create",
        "read",
        "write",
        "fsync",
        "rename",
        "link",
        "unlink",
        "mkdir",
        "truncate",
        "stat",
        "list",
        "mmap",
    ],
)
def test_a_call_fails(place: Path, call: str) -> None:
    on = NAMES.get(call, "*/tree" if call == "list" else "*/old")
    found, shim = play(place, [Rule(call, on, "ESTALE")], call)
    assert found[call] == 116
    assert shim.hits()[0] >= 1
    assert play(place, [Rule(call, on, "ESTALE", rank="1")], call)[0][call] == 0


def test_a_rule_counts_the_calls_of_all_processes(place: Path) -> None:
    shim = Shim(place, [Rule("write", "*/log", "EIO", 1, skip=1)])
    found = []
    for _ in range(3):
        command = [sys.executable, "-c", CALLS, str(place), "write"]
        done = subprocess.run(command, env=os.environ | shim.environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout)["write"])
    assert found == [0, 5, 0]
    assert shim.hits() == [1]


def test_free_space_short_writes_and_the_clock(place: Path) -> None:
    rules = [Rule("free", str(place), "0"), Rule("clock", "", "-86400"), Rule("write", "*/short", "SHORT")]
    found, _ = play(place, rules)
    assert (found["free"], found["wrote"]) == (0, 2)
    assert abs(found["time"] + 86400 - time.time()) < 600


def test_a_kill(place: Path) -> None:
    shim = Shim(place, [Rule("write", "*/log", "KILL")])
    command = [sys.executable, "-c", CALLS, str(place), "write"]
    assert subprocess.run(command, env=os.environ | shim.environment, check=False).returncode == -9
    shim.disarm()
    assert subprocess.run(command, env=os.environ | shim.environment, check=False).returncode == 0
