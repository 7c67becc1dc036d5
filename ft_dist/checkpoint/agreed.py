"""What rank 0 finds on disk and all ranks then use: the commit to load, and the base model."""

import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ft_dist.checkpoint.commit.format import Commit
from ft_dist.checkpoint.commit.retention import by_loss
from ft_dist.checkpoint.find import first_intact
from ft_dist.checkpoint.identity import base_model, sampled_digest
from ft_dist.checkpoint.state import BaseRecord
from ft_dist.config import RunConfig
from ft_dist.distributed import World, decided
from ft_dist.errors import ModelError
from ft_dist.storage import Storage


def agreed_best(
    world: World, *, losses: Mapping[int, float], current: int, root: Path, storage: Storage | None, timeout_s: float
) -> tuple[Commit | None, list[str]]:
    """The commit with the lowest of the held-out `losses` (by step), if lower than that of step
    `current`."""

    def better(steps: Iterable[int]) -> list[int]:
        ranked = by_loss({*steps, current}, losses)
        return ranked[: ranked.index(current)] if current in ranked else ranked

    return _agreed(world, "checkpoint/best", lambda: first_intact(better, root, storage), timeout_s=timeout_s)


def _agreed(
    world: World, key: str, search: Callable[[], tuple[Commit | None, list[str]]], *, timeout_s: float
) -> tuple[Commit | None, list[str]]:
    """What `search` finds on rank 0, which reads and verifies; the others wait for its answer."""
    answer = decided(world, key, lambda: as_answer(*search()), timeout_s=timeout_s)
    return of_answer(answer), answer["skipped"]


def as_answer(commit: Commit | None, skipped: list[str]) -> dict[str, Any]:
    """For the other ranks."""
    place = {"folder": str(commit.folder), "step": commit.step} if commit else None
    return {"commit": place, "skipped": skipped}


def of_answer(answer: dict[str, Any]) -> Commit | None:
    place = answer["commit"]
    return Commit(Path(place["folder"]), place["step"]) if place else None


def agreed_base(config: RunConfig, world: World, *, folder: str) -> BaseRecord:
    """The base model, which rank 0 reads whole; every other node compares samples of its own copy. A collective.

    Raises ModelError (UserError on the other ranks) if a node has another model.
    """
    timeout_s = config.engine.timeout_s
    found = decided(world, "checkpoint/base", lambda: base_model(config, folder).model_dump(), timeout_s=timeout_s)
    base = BaseRecord.model_validate(found)

    def compare() -> None:
        own = sampled_digest(Path(folder)) if world.local_rank == 0 and Path(folder).is_dir() else None
        if None not in (own, base.digest) and own != base.digest:
            raise ModelError(
                f"model.path={config.model.path}: its weights on {socket.gethostname()} differ from those on the node "
                "of rank 0. Copy the same model to every node, or set model.revision."
            )

    decided(world, "checkpoint/base of each node", compare, timeout_s=timeout_s, together=True)
    return base
