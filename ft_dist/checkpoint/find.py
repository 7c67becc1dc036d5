"""Which commit a run goes on from: found and verified once, by rank 0, for all ranks."""

import json
from datetime import timedelta
from pathlib import Path

from ft_dist.checkpoint.commit.format import Commit, commits, step_of, verify
from ft_dist.checkpoint.commit.mirror import fetch, remote_steps
from ft_dist.distributed import World, control_store
from ft_dist.errors import CheckpointError, StorageError
from ft_dist.storage import Storage


def agreed_commit(
    world: World, *, resume: str, root: Path, storage: Storage | None, timeout_s: float
) -> tuple[Commit | None, list[str]]:
    """The commit that `checkpoint.resume` means, the same on every rank, and a line for each that was passed over.

    Rank 0 reads and verifies; the others wait for its word. Raises CheckpointError, on every rank alike.
    """
    key, store = "checkpoint/resume", control_store()
    if world.is_main:
        try:
            commit, passed_over = find(resume=resume, root=root, storage=storage)
        except (CheckpointError, StorageError) as error:
            store.set(key, json.dumps({"error": str(error)}))
            raise
        place = {"folder": str(commit.folder), "step": commit.step} if commit else None
        store.set(key, json.dumps({"commit": place, "passed_over": passed_over}))
        return commit, passed_over
    store.wait([key], timedelta(seconds=timeout_s))
    answer = json.loads(store.get(key))
    if "error" in answer:
        raise CheckpointError(answer["error"])
    place = answer["commit"]
    return Commit(Path(place["folder"]), place["step"]) if place else None, answer["passed_over"]


def find(*, resume: str, root: Path, storage: Storage | None = None) -> tuple[Commit | None, list[str]]:
    """As `agreed_commit`, for one process."""
    if resume == "never":
        return None, []
    if resume == "auto":
        return newest_intact(root, storage)
    commit = named_commit(Path(resume))
    verify(commit)
    return commit, []


def named_commit(folder: Path) -> Commit:
    """The commit in a folder that the user names. Raises CheckpointError."""
    step = step_of(folder.name)
    if step is None:
        raise CheckpointError(f"{folder}: a checkpoint's folder is called step-N, for example step-00000100.")
    return Commit(folder, step)


def newest_intact(root: Path, storage: Storage | None = None) -> tuple[Commit | None, list[str]]:
    """The newest commit, here or in `storage`, whose checksums hold, and a line for each newer one passed over.

    One that is only in the store, or intact only there, is fetched. A damaged local one is set aside as
    `step-N.damaged`: it can be looked at, and is neither found again nor counted when old ones are deleted.
    """
    passed_over = []
    local = {commit.step: commit for commit in commits(root)}
    remote: set[int] = set()
    if storage:
        try:
            remote = set(remote_steps(storage))
        except StorageError as error:
            if not local:
                raise
            passed_over.append(f"{error} The newest local checkpoint is taken.")
    for step in sorted(local.keys() | remote, reverse=True):
        if step in local:
            try:
                verify(local[step])
                return local[step], passed_over
            except CheckpointError as error:
                passed_over.append(str(error))
                _set_aside(local[step])
        if storage and step in remote:
            try:
                return fetch(storage, step, root), passed_over
            except (CheckpointError, StorageError) as error:
                passed_over.append(str(error))
    return None, passed_over


def _set_aside(commit: Commit) -> None:
    place = commit.folder.with_name(f"{commit.folder.name}.damaged")
    number = 1
    while place.exists():
        number += 1
        place = commit.folder.with_name(f"{commit.folder.name}.damaged{number}")
    commit.folder.rename(place)
