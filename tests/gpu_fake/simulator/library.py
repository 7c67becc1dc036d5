"""The simulated device's C++ half (device.cpp), compiled once into the cache and loaded into this process."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
ROOT = SOURCE.parents[3]


def cache_dir() -> Path:
    """The folder of the library and of compiled kernels, in the tests' own cache."""
    return Path(os.environ.get("FT_DIST_CACHE") or ROOT / ".cache") / "gpu_fake"


def load() -> None:
    """Call before torch is imported. Exits with a one-line error if the library cannot be built."""
    if "torch" in sys.modules:
        raise SystemExit("tests/gpu_fake: torch is loaded already; the simulated device has to come first.")
    ctypes.CDLL(str(_built()))


def _built() -> Path:
    torch_version = version("torch")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    built = cache_dir() / f"device-{torch_version}-{digest}.so"
    if not built.exists():
        from filelock import FileLock

        built.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(built.with_suffix(".lock")):
            if not built.exists():
                _compile(built)
    return built


def _compile(built: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise SystemExit("tests/gpu_fake: no g++, which builds the simulated GPU. Install it (apt-get install g++).")
    found = importlib.util.find_spec("torch")
    assert found is not None, "ft_dist depends on torch"
    assert found.submodule_search_locations is not None, "torch is a package"
    torch = Path(found.submodule_search_locations[0])
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise SystemExit("tests/gpu_fake: this torch is built for CUDA; the simulation needs a CPU build of it.")
    include, lib = torch / "include", torch / "lib"
    partial = built.with_suffix(f".{os.getpid()}")
    arguments = ["-O0", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(partial), f"-I{include}"]
    arguments += [f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", f"-L{lib}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run([compiler, *arguments, f"-Wl,-rpath,{lib}"], capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
        raise SystemExit(f"tests/gpu_fake: {compiler} cannot build {SOURCE.name}: {reason}")
    partial.rename(built)
