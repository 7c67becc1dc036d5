"""Runs the Triton kernels on CPU tensors, under Triton's interpreter, wherever Triton is installed.

Triton chooses the interpreter when a kernel is decorated, so TRITON_INTERPRET must be set while triton and the kernels
are imported, and only then: it is unset before any test runs, so that no process started by another test inherits it.
If something imported triton earlier in this process, the tests marked `interpreter` run in a separate process.
"""

import contextlib
import importlib
import importlib.util
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import ft_dist_kernels
import pytest

ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None


def _import_interpreted() -> bool:
    """Imports triton and every kernel under the interpreter; False if triton was imported without it before."""
    before = os.environ.get("TRITON_INTERPRET")
    if "triton" not in sys.modules and "ft_dist_kernels.backend" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        triton = importlib.import_module("triton.language")
        with contextlib.suppress(ImportError):
            # The interpreter imports it at the first launch, and it asserts that the variable is set.
            importlib.import_module("triton.experimental.gluon")
        for module in pkgutil.walk_packages(ft_dist_kernels.__path__, "ft_dist_kernels."):
            # A module that fails to import fails its own tests, which import it too.
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
    backend = importlib.import_module("ft_dist_kernels.backend")
    return backend.INTERPRETED and type(triton.cdiv).__name__ == "InterpretedFunction"


INTERPRETED = HAS_TRITON and _import_interpreted()


class InterpreterProcess(pytest.Item):
    """The interpreter tests of one file, in a process where nothing imported triton first."""

    def __init__(self, *, node_ids: list[str], **kwargs):
        super().__init__(**kwargs)
        self.node_ids = node_ids

    def runtest(self):
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist"]
        result = subprocess.run(
            command + self.node_ids,
            cwd=self.config.rootpath,
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            pytest.fail(result.stdout[-8000:] + result.stderr[-2000:], pytrace=False)

    def reportinfo(self):
        return self.path, None, f"{self.path.name}: {len(self.node_ids)} interpreter tests in their own process"


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreter: runs Triton kernels on CPU tensors")


def pytest_collection_modifyitems(session, config, items):
    ours = [item for item in items if item.get_closest_marker("interpreter")]
    if INTERPRETED or not ours:
        return
    if not HAS_TRITON:
        for item in ours:
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))
        return
    by_file: dict[Path, list[pytest.Item]] = {}
    for item in ours:
        by_file.setdefault(item.path, []).append(item)
    items[:] = [item for item in items if item not in set(ours)]
    for tests in by_file.values():
        parent = tests[0].getparent(pytest.Module)
        items.append(
            InterpreterProcess.from_parent(parent, name="interpreter", node_ids=[test.nodeid for test in tests])
        )
