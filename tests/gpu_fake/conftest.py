"""The simulated GPU runs in separate processes, because it changes torch for the whole process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.fixture
def simulated(tmp_path: Path) -> Callable[..., Any]:
    """Run `python -m tests.gpu_fake.MODULE ARGUMENTS` and return its JSON output. `first` comes first on the
    module path."""

    def run(module: str, *arguments: str, first: str = "") -> Any:
        written = tmp_path / "written.json"
        path = os.pathsep.join([*([first] if first else []), str(ROOT), str(ROOT / "kernels")])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", f"tests.gpu_fake.{module}", *arguments, "--json", str(written)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert written.exists(), f"{module} broke off:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return json.loads(written.read_text())

    return run
