"""Our side: `ft-dist train` on the same case. Packed steps hold about as many samples as the peers' steps."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers.case import Case, Command, Peer, Step
from ft_dist.config import RunConfig
from ft_dist.config.load import validate

ROOT = Path(__file__).resolve().parents[2]


def settings(case: Case, folder: Path, *, chats: Path, packed_length: int = 0) -> dict[str, Any]:
    """The config of a run on `chats`; `packed_length`: tokens in the step's single packed row, 0 for no packing."""
    packing = {"packing": True, "max_length": packed_length} if packed_length else {"packing": False}
    rows = 1 if packed_length else case.rows
    return {
        "model": {"path": str(case.model), "dtype": case.dtype},
        "method": {
            "kind": case.method,
            "rank": case.rank,
            "alpha": case.alpha,
            "target_modules": list(case.targets),
        },
        "data": {"train": [str(chats)], "max_length": case.max_length, "cache_dir": str(folder / "cache")} | packing,
        "batch": {"global_rows": rows, "micro_rows": rows},
        "optim": {"lr": case.learning_rate, "schedule": "constant", "max_steps": case.steps},
        "checkpoint": {"interval_steps": 0, "resume": "never"},
        "output_dir": str(folder / "run"),
        "seed": case.seed,
    }


def config(case: Case, folder: Path, *, chats: Path) -> RunConfig:
    """The unpacked run's config as the product loads it."""
    return validate(settings(case, folder, chats=chats))


def command(case: Case, folder: Path, binaries: Path) -> Command:
    """We train on `chats.jsonl`, next to `case.ordered`, which holds the same chats in our order for the peers."""
    chats = case.ordered.with_name("chats.jsonl")
    length = case.packed_length if case.packed else 0
    tree = settings(case, folder, chats=chats, packed_length=length)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return Command(
        [sys.executable, "-m", "ft_dist.cli", "train", str(folder / "config.yaml"), "--nproc", "1"],
        {"PYTHONPATH": os.pathsep.join(paths)},
        steps_file=folder / "run" / "metrics.jsonl",
    )


def step_of(line: str, seen: int) -> Step | None:
    record = json.loads(line)
    return Step(record["step"], record["loss"])


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in metrics(folder)}


def metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


PEER = Peer(
    name="ours", command=command, step_of=step_of, losses=losses, packs=True, note="packed: rows of several samples"
)
