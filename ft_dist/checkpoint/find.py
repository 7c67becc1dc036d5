"""Finds the commit that a run resumes from, the best, or that of a step. In a run, rank 0 verifies it for all ranks."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ft_dist.checkpoint.commit.format import Commit, commits, named_commit, verify
from ft_dist.checkpoint.commit.mirror import fetch, remote_steps
from ft_dist.checkpoint.commit.retention import by_loss
from ft_dist.checkpoint.state import RunState
from ft_dist.distributed import World, decided
from ft_dist.errors import CheckpointError, StorageError
from ft_dist.storage import Storage

Step = int | Literal["best"]


def agreed_commit(
    world: World, *, resume: str, root: Path, storage: Storage | None, timeout_s: float
) -> tuple[Commit | None, list[str]]:
    """The commit that `checkpoint.resume` selects, the same on every rank, and one line per skipped commit.

    Raises UserError on every rank, on rank 0 as CheckpointError or StorageError.
    """
    return _agreed(
        world, "checkpoint/resume", lambda: find(resume=resume, root=root, storage=storage), timeout_s=timeout_s
    )


def agreed_best(
    world: World, *, losses: Mapping[int, float], current: int, root: Path, storage: Storage | None, timeout_s: float
) -> tuple[Commit | None, list[str]]:
    """Like `agreed_commit`: the commit with the lowest of the held-out `losses` (by step), if lower than that of step
    `current`."""

    def better(steps: Iterable[int]) -> list[int]:
        ranked = by_loss({*steps, current}, losses)
        return ranked[: ranked.index(current)] if current in ranked else ranked

    return _agreed(world, "checkpoint/best", lambda: _first_intact(better, root, storage), timeout_s=timeout_s)


def _agreed(
    world: World, key: str, search: Callable[[], tuple[Commit | None, list[str]]], *, timeout_s: float
) -> tuple[Commit | None, list[str]]:
    """What `search` finds on rank 0, which reads and verifies; the others wait for its answer."""

    def found() -> dict[str, Any]:
        commit, skipped = search()
        place = {"folder": str(commit.folder), "step": commit.step} if commit else None
        return {"commit": place, "skipped": skipped}

    answer = decided(world, key, found, timeout_s=timeout_s)
    place = answer["commit"]
    return Commit(Path(place["folder"]), place["step"]) if place else None, answer["skipped"]


def find(*, resume: str, root: Path, storage: Storage | None = None) -> tuple[Commit | None, list[str]]:
    """Like `agreed_commit`, for one process."""
    if resume == "never":
        return None, []
    if resume == "auto":
        return newest_intact(root, storage)
    commit = named_commit(Path(resume))
    try:
        verify(commit)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Name another checkpoint, or set checkpoint.resume=auto.") from None
    return commit, []


def newest_intact(root: Path, storage: Storage | None = None) -> tuple[Commit | None, list[str]]:
    """The newest commit, local or in `storage`, whose checksums match, and one line per newer commit skipped."""
    return _first_intact(lambda steps: sorted(steps, reverse=True), root, storage)


def _first_intact(
    order: Callable[[Iterable[int]], list[int]], root: Path, storage: Storage | None
) -> tuple[Commit | None, list[str]]:
    """The first commit in the `order` of the steps found whose checksums match, and one line per commit skipped.

    A commit that is missing or damaged locally is downloaded from the store. A damaged local commit is renamed to
    `step-N.damaged`: it can be inspected, but is neither found again nor counted by retention.
    """
    skipped = []
    local = {commit.step: commit for commit in commits(root)}
    remote: set[int] = set()
    if storage:
        try:
            remote = set(remote_steps(storage))
        except StorageError as error:
            if not local:
                raise
            skipped.append(f"{error} The newest local checkpoint is used.")
    for step in order(local.keys() | remote):
        if step in local:
            try:
                verify(local[step])
                return local[step], skipped
            except CheckpointError as error:
                skipped.append(str(error))
                _set_aside(local[step])
        if storage and step in remote:
            try:
                return fetch(storage, step, root), skipped
            except (CheckpointError, StorageError) as error:
                skipped.append(str(error))
    return None, skipped


def commit_of_step(root: Path, step: Step) -> Commit:
    """The intact local commit of `step`; "best" is the one with the lowest held-out loss in the newest commit's state.

    Raises CheckpointError naming the steps that could be chosen.
    """
    found = {commit.step: commit for commit in commits(root)}
    if not found:
        raise CheckpointError(f"{root}: holds no checkpoint yet. Wait for the run's first commit.")
    if step == "best":
        losses = RunState.from_dict(found[max(found)].state()).held_out_losses
        ranked = by_loss(found, losses)
        if not ranked:
            raise CheckpointError(
                f"{root}: none of its checkpoints ({_steps(found)}) was evaluated, so none is the best. The run "
                f"evaluated {_steps(losses)}. Name the step of a checkpoint, or train with optim.load_best=true, which "
                "commits every evaluated step."
            )
        step = ranked[0]
    if step not in found:
        raise CheckpointError(f"{root}: holds no checkpoint of step {step}, only {_steps(found)}. Name one of them.")
    verify(found[step])
    return found[step]


def _steps(steps: Iterable[int]) -> str:
    names = [str(step) for step in sorted(steps)]
    return f"step{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else "no step"


def _set_aside(commit: Commit) -> None:
    place = commit.folder.with_name(f"{commit.folder.name}.damaged")
    number = 1
    while place.exists():
        number += 1
        place = commit.folder.with_name(f"{commit.folder.name}.damaged{number}")
    commit.folder.rename(place)
