"""Runs made once per layout: one that no fault disturbs, which every other must equal, and one killed half-way."""

import shutil
from pathlib import Path

from filelock import FileLock

from tests.conftest import ROOT
from tests.faults.planted import commits
from tests.faults.scene import HALF, INTERVAL, Scene
from tests.faults.shim import Rule

RECORDS = 48


class Prepared:
    """Whole and half runs below `folder`, which several processes may share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock")

    def whole(self, ranks: int) -> Scene:
        """A run of all steps."""
        return self._made("whole", ranks)

    def scene(self, folder: Path, *, ranks: int, half: bool) -> Scene:
        """A new scene with everything in its caches; `half`: its run was killed after the commit of step HALF."""
        source = self._made("half" if half else "whole", ranks).folder
        copy(source, folder, "cache", "data", *(["run"] if half else []))
        return Scene(folder, ranks=ranks)

    def _made(self, name: str, ranks: int) -> Scene:
        scene = Scene(self.folder / f"{name}-{ranks}", ranks=ranks)
        done = scene.folder / "done"
        with self._lock:
            if not done.exists():
                shutil.rmtree(scene.folder, ignore_errors=True)
                if name == "half":
                    copy(self._made("whole", ranks).folder, scene.folder, "cache", "data")
                    train_half(scene)
                else:
                    train_whole(scene)
                done.touch()
        return scene


def copy(source: Path, target: Path, *parts: str) -> None:
    for part in parts:
        shutil.copytree(source / part, target / part, symlinks=True)


def train_whole(scene: Scene) -> None:
    scene.data.parent.mkdir(parents=True)
    lines = (ROOT / "configs/emails/train.jsonl").read_text().splitlines()[:RECORDS]
    scene.data.write_text("".join(f"{line}\n" for line in lines))
    life = scene.play()
    assert life.code == 0, life.said


def train_half(scene: Scene) -> None:
    deadly = Rule("mkdir", f"step-{HALF + INTERVAL:08d}.saving-", "KILL", rank="0")
    life = scene.play("--max-restarts", "0", rules=[deadly])
    assert commits(scene.root) == [HALF - INTERVAL, HALF], life.said
