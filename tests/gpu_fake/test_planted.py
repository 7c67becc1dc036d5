"""The simulation's checks can fail: each planted fault is refused or counted, by name."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

EXPECTED = {
    # the compiler decides how many bytes it takes
    "shared memory": "bytes of shared memory; a block of this chip has 232448",
    "argument on the host": "add_one: an argument of shape (16,) is on cpu, not cuda",
    "grid too large": "add_one: grid (1, 70000) has y=70000, which must be in 1..65535",
    "grid of nothing": "add_one: grid (0,) has x=0, which must be in 1..2147483647",
    "does not compile at 1": "'int' object has no attribute 'to'",
    "mask with groups": "a dense mask together with enable_gqa",
    "value read": "1 x value read",
    "values read": "1 x value read",
    "size read": "1 x nonzero",
    "mask as index": "1 x index with a mask",
    "copy that waits": "1 x copy to the device",
    "wait by name": "1 x torch.cuda.synchronize",
}


def test_planted_faults_are_found(simulated: Callable[..., Any]) -> None:
    said = simulated("planted")
    assert said.pop("copy that does not") == ""
    assert said.keys() == EXPECTED.keys()
    unseen = {name: said[name] for name, message in EXPECTED.items() if message not in said[name]}
    assert not unseen


def test_a_missing_compiler_is_reported(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_fake.planted"],
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path), "FT_DIST_CACHE": str(tmp_path), "CXX": "g++"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no g++" in line
    assert "Install it" in line
