"""A tensor file that the system cannot open or map is an OSError, whether Python, Rust or torch meets it first."""

import errno
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.faults.shim import Rule, Shim

OPENED = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from ft_dist.storage.tensors import open_tensor_file
path = Path(sys.argv[1])
save_file({"a": torch.zeros(3)}, path)
Path(sys.argv[2]).touch()
try:
    open_tensor_file(path)
except OSError as error:
    print(error.errno)
"""


@pytest.mark.parametrize(
    "call, name, earlier", [("open", "EMFILE", 0), ("open", "EMFILE", 2), ("mmap", "EIO", 0), ("mmap", "EIO", 1)]
)
def test_an_error_of_the_system_is_an_oserror(tmp_path, call, name, earlier):
    shim = Shim(tmp_path, [Rule(call, "x.safetensors", name, skip=earlier)])
    shim.disarm()  # the script arms it, once the file is there
    script = [sys.executable, "-c", OPENED, str(tmp_path / "x.safetensors"), str(tmp_path / "armed")]
    environment = os.environ | shim.environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(script, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{getattr(errno, name)}\n", done.stderr
