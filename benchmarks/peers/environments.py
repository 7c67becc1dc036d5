"""One virtual environment per peer, built on demand and kept: `~/.cache/ft_dist/peers/NAME`.

`requirements.txt` in the peer's folder is the recipe: torch is installed first, at an exact version, and pins the rest.
Lines of `steps.txt`, if present, are pip commands to run afterwards. A changed recipe rebuilds the environment.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from ft_dist.model.builtin import cache_dir

NAMES = ("trl", "llamafactory", "ms-swift", "litgpt", "torchtune", "axolotl")
RECIPES = Path(__file__).parent
TORCH = "torch==2.13.0"
LIMIT_S = 1800.0
REPORTED = ("torch", "transformers", "peft", "accelerate", "lightning", *NAMES)


class EnvironmentFailedError(Exception):
    """pip's last lines"""


def place(name: str) -> Path:
    return cache_dir() / "peers" / name


def is_built(name: str) -> bool:
    mark = place(name) / ".built"
    return mark.is_file() and mark.read_text() == _fingerprint(name)


def build(name: str, *, say: bool = True) -> Path:
    """The bin/ of the peer's environment. Raises EnvironmentFailedError."""
    binaries = place(name) / "bin"
    if is_built(name):
        return binaries
    if say:
        print(f"{name}: building its environment in {place(name)} (minutes)", flush=True)
    shutil.rmtree(place(name), ignore_errors=True)
    python = [str(binaries / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    pins = place(name) / "pins.txt"
    _run([sys.executable, "-m", "venv", str(place(name))])
    pins.write_text(TORCH + "\n")
    _run([*python, "install", "--no-compile", TORCH])
    _run([*python, "install", "--no-compile", "-c", str(pins), "-r", str(_folder(name) / "requirements.txt")])
    for line in _steps(name):
        _run([*python, *line.split()])
    for stub in (_folder(name) / "site").glob("*"):
        _copy_into_site(stub, place(name))
    (place(name) / ".built").write_text(_fingerprint(name))
    return binaries


def versions(name: str) -> dict[str, str]:
    """The installed versions of the packages that matter to a reader."""
    command = [str(place(name) / "bin" / "python"), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = json.loads(done.stdout) if done.returncode == 0 else []
    versions = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in found}
    return {package: versions[package] for package in REPORTED if package in versions}


def _folder(name: str) -> Path:
    return RECIPES / name.replace("-", "_")


def _steps(name: str) -> list[str]:
    file = _folder(name) / "steps.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [line for line in lines if line and not line.startswith("#")]


def _copy_into_site(stub: Path, environment: Path) -> None:
    site = next((environment / "lib").glob("python3*")) / "site-packages"
    shutil.copytree(stub, site / stub.name, dirs_exist_ok=True)


def _fingerprint(name: str) -> str:
    digest = hashlib.sha256(f"{TORCH} {sys.version_info[:2]}".encode())
    files = [path for path in (_folder(name) / "site").rglob("*") if path.suffix == ".py"]
    for path in [_folder(name) / "requirements.txt", _folder(name) / "steps.txt", *sorted(files)]:
        digest.update(path.read_bytes() if path.is_file() else b"-")
    return digest.hexdigest()


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise EnvironmentFailedError(f"{' '.join(command[-3:])}: took longer than {LIMIT_S:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "WARNING" not in line and line.strip()]
        raise EnvironmentFailedError(" ".join(lines[-2:]) or f"exit code {done.returncode}")
