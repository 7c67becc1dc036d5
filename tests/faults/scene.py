"""The place of one fault: a run folder with all that belongs to it, and the starts (lives) of its command."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from tests.chaos.storm import workers_of
from tests.conftest import CLI, read_lines
from tests.faults.planted import commits
from tests.faults.shim import Rule, Shim, with_plants
from tests.launcher.processes import marked

STEPS = 12
INTERVAL = 2
HALF = 6
"""The newest commit of a run that was killed half-way"""
LIFE_S = 300.0
RECIPE = "smoke"


@dataclass
class Life:
    """One start of the command. `commits` are those in the run folder when it began."""

    process: "subprocess.Popen[str]"
    shim: Shim
    commits: list[int]
    code: int | None = None
    out: str = ""
    err: str = ""
    hung: bool = False

    @property
    def said(self) -> str:
        return self.out + self.err


@dataclass
class Scene:
    """`folder` has the run's `run`, its `cache`, `data`, `mirror` and temporary files, nothing else has any.

    The command is started there, so that all scenes have the same config.
    """

    folder: Path
    ranks: int = 1
    settings: list[str] = field(default_factory=list)
    recipe: str = RECIPE
    environment: dict[str, str] = field(default_factory=dict)
    lives: list[Life] = field(default_factory=list)
    mounts: list[Path] = field(default_factory=list)
    program: list[str] = field(default_factory=lambda: [*CLI, "train"])
    prefix: list[str] = field(default_factory=list)
    """Before the command, such as `unshare -m`"""

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def root(self) -> Path:
        return self.run / "checkpoints"

    @property
    def mirror(self) -> Path:
        return self.folder / "mirror"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def data(self) -> Path:
        return self.folder / "data" / "train.jsonl"

    @property
    def newest(self) -> int:
        return max(commits(self.root), default=0)

    def command(self, *more: str) -> list[str]:
        settings = [
            "model.dtype=fp32",
            "data.train=[data/train.jsonl]",
            "data.eval=[]",
            "data.packing=false",
            "data.log_samples=true",
            "batch.global_rows=2",
            f"optim.max_steps={STEPS}",
            f"checkpoint.interval_steps={INTERVAL}",
            "output_dir=run",
        ]
        options = ["--nproc", str(self.ranks), "--max-restarts", "1"]
        return [*self.prefix, *self.program, self.recipe, *settings, *self.settings, *options, *more]

    def start(
        self, *more: str, rules: Sequence[Rule] = (), plant: Mapping[str, object] | None = None, **popen: Any
    ) -> Life:
        """Start the command; `rules` and `plant` are the faults."""
        shim = Shim(self.folder, rules)
        (self.folder / "tmp").mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "FT_DIST_CACHE": str(self.cache),
            "TMPDIR": str(self.folder / "tmp"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "FT_DIST_TEST_RUN": str(self.folder),
            **with_plants(self.folder, plant or {}),
            **shim.environment,
            **self.environment,
        }
        options: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "cwd": self.folder,
        }
        life = Life(
            subprocess.Popen(self.command(*more), env=environment, start_new_session=True, **options | popen),
            shim,
            commits(self.root),
        )
        self.lives.append(life)
        return life

    def end(self, life: Life, *, within_s: float = LIFE_S) -> Life:
        """Wait until the command has ended; one that does not is killed."""
        try:
            life.out, life.err = (text or "" for text in life.process.communicate(timeout=within_s))
        except subprocess.TimeoutExpired:
            life.hung = True
            self.kill_all()
            life.out, life.err = (text or "" for text in life.process.communicate())
        life.code = life.process.returncode
        return life

    def play(self, *more: str, **options: Any) -> Life:
        return self.end(self.start(*more, **options))

    @contextmanager
    def paused(self, life: Life) -> Iterator[list[int]]:
        """Once the run pauses (`plant={"pause": STEP}`): the process ids of its ranks. It continues afterwards."""
        deadline = time.monotonic() + LIFE_S
        while not (self.folder / "paused-0").exists():
            if life.process.poll() is not None or time.monotonic() > deadline:
                self.end(life, within_s=5)
                raise AssertionError(f"the run did not reach the step of the pause: {life.code} {life.said[-2000:]}")
            time.sleep(0.01)
        self.wait_for_save()
        try:
            yield workers_of(life.process.pid)
        finally:
            (self.folder / "go").touch()

    def wait_for_save(self) -> None:
        """No save is in flight."""
        deadline = time.monotonic() + 20
        while list(self.root.glob("*.saving-*")) and time.monotonic() < deadline:
            time.sleep(0.01)

    def processes(self) -> list[int]:
        """Every process of the scene that still runs."""
        return marked(str(self.folder))

    def kill_all(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def mount(self, place: Path, options: str) -> None:
        """Mount a tmpfs and keep what the folder holds. Needs root."""
        place.mkdir(parents=True, exist_ok=True)
        kept = self.folder / f"kept-{place.name}"
        shutil.copytree(place, kept, symlinks=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
        self.mounts.append(place)
        shutil.copytree(kept, place, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(kept)

    def remount(self, place: Path, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)

    def close(self) -> None:
        self.kill_all()
        for place in self.mounts:
            subprocess.run(["umount", "-l", str(place)], check=False)

    def trace(self) -> list[dict[str, Any]]:
        path = self.folder / "trace"
        return read_lines(path) if path.exists() else []


def damaged_files(folder: Path) -> list[str]:
    """The files of a sealed commit that are missing or are not as its manifest says."""
    manifest = json.loads((folder / "manifest.json").read_text())
    found = []
    for name, expected in manifest["files"].items():
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        if len(content) != expected["bytes"] or xxhash.xxh3_128_hexdigest(content) != expected["xxh3"]:
            found.append(f"{folder.name}/{name}")
    return found
