"""Installs a folder of wheels into its own folder, offline; the machine's Python does not change."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT_S = 60.0


def install(wheels: Path, site: Path) -> dict[str, Any]:
    """Install all in one call; if pip refuses, bisect until only the bad wheels are left out."""
    started = time.monotonic()
    found = sorted(wheels.glob("*.whl"))
    failed: dict[str, str] = {}
    waiting = [found] if found else []
    while waiting:
        some = waiting.pop()
        left = LIMIT_S - (time.monotonic() - started)
        why = _pip(some, site, left) if left > 0 else "no time left"
        if why and len(some) > 1 and left > 0:
            waiting += [some[: len(some) // 2], some[len(some) // 2 :]]
        elif why:
            failed |= dict.fromkeys((wheel.name for wheel in some), why)
    return {"wheels": len(found), "failed": failed, "seconds": round(time.monotonic() - started, 2)}


def _pip(wheels: list[Path], site: Path, limit_s: float) -> str | None:
    """None on success, otherwise pip's last line."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(site), *map(str, wheels)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"pip took longer than {limit_s:.0f} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return None if done.returncode == 0 else (lines or [f"exit code {done.returncode}"])[-1][:300]
