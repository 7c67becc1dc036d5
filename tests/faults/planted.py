"""Loaded by every process of a run under test (`shim.with_plants`): traces it, and plants faults that no call shows.

FAULTS_PLANT is a JSON object:

    folder               of the scene; `trace` there gets a line per rank when its process starts, and one per step
    pause: STEP          before this step, rank 0 creates `paused` and waits for `go`
    raise: [STEP, N]     before this step, rank 0 raises what a GPU raises, in its first N attempts
    hang: STEP           before this step, the last rank stops for ever, once
    die_evaluating: RANK the rank gets SIGKILL when it begins to score the model during training, once
"""

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

PAUSE_S = 180.0
CUDA_ERROR = "CUDA error: an illegal memory access was encountered"

PLANT: dict[str, Any] = json.loads(os.environ.get("FAULTS_PLANT", "{}"))
FOLDER = Path(PLANT.get("folder", "."))
RANK = int(os.environ.get("RANK", -1))


def commits(root: Path) -> list[int]:
    """Steps of the sealed commits, found without the product's own code."""
    return sorted(int(path.parent.name[5:]) for path in root.glob("step-????????/manifest.json"))


@lru_cache(maxsize=1)
def trace_file() -> int:
    """Stays open: later there may be no descriptor left for it."""
    return os.open(FOLDER / "trace", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)


def trace(**fields: Any) -> None:
    os.write(trace_file(), (json.dumps({"rank": RANK, "pid": os.getpid(), **fields}) + "\n").encode())


def once(name: str, times: int = 1) -> bool:
    """True the first `times` times, over all processes of the scene."""
    for number in range(times):
        try:
            os.close(os.open(FOLDER / f"{name}-{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return True
    return False


def before_step(step: int) -> None:
    """`step` counts from 1."""
    trace(step=step)
    if PLANT.get("pause") == step and RANK == 0 and once("paused"):
        deadline = time.monotonic() + PAUSE_S
        while not (FOLDER / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    number, times = PLANT.get("raise", [0, 0])
    if number == step and RANK == 0 and once("raised", times):
        raise RuntimeError(CUDA_ERROR)
    if PLANT.get("hang") == step and int(os.environ["WORLD_SIZE"]) == RANK + 1 and once("hung"):
        time.sleep(10**6)


def plant_in_run(module: ModuleType) -> None:
    seed_step = module.Run.seed_step

    def traced(run: Any) -> None:
        before_step(run.step + 1)
        seed_step(run)

    module.Run.seed_step = traced


def plant_in_evaluations(module: ModuleType) -> None:
    score = module.Evaluations.score

    def deadly(self: Any, when: str, **options: Any) -> Any:
        if when == "during" and PLANT.get("die_evaluating") == RANK and once("died"):
            os.kill(os.getpid(), signal.SIGKILL)
        return score(self, when, **options)

    module.Evaluations.score = deadly


PLANTS: dict[str, Callable[[ModuleType], None]] = {
    "ft_dist.run.run": plant_in_run,
    "ft_dist.run.evaluations": plant_in_evaluations,
}


class Planter(importlib.abc.MetaPathFinder):
    """Changes a module right after it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in PLANTS else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def planted(module: ModuleType) -> None:
            execute(module)
            PLANTS[name](module)

        spec.loader.exec_module = planted  # type: ignore[method-assign]
        return spec


if RANK >= 0 and PLANT:
    trace(commits=commits(FOLDER / "run" / "checkpoints"))
    sys.meta_path.insert(0, Planter())
