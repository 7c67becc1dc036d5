"""Finds the commit that a run resumes from: rank 0 verifies it once for all ranks."""

import json
from datetime import timedelta
from pathlib import Path

from ft_dist.checkpoint.commit.format import Commit, commits, named_commit, verify
from ft_dist.checkpoint.commit.mirror import fetch, remote_steps
from ft_dist.distributed import World, control_store
from ft_dist.errors import CheckpointError, StorageError
from ft_dist.storage import Storage


def agreed_commit(
    world: World, *, resume: str, root: Path, storage: Storage | None, timeout_s: float
) -> tuple[Commit | None, list[str]]:
    """The commit that `checkpoint.resume` selects, the same on every rank, and one line per skipped commit.

    Rank 0 reads and verifies; the others wait for its answer. Raises CheckpointError on every rank.
    """
    key, store = "checkpoint/resume", control_store()
    if world.is_main:
        try:
            commit, skipped = find(resume=resume, root=root, storage=storage)
        except (CheckpointError, StorageError) as error:
            store.set(key, json.dumps({"error": str(error)}))
            raise
        place = {"folder": str(commit.folder), "step": commit.step} if commit else None
        store.set(key, json.dumps({"commit": place, "skipped": skipped}))
        return commit, skipped
    store.wait([key], timedelta(seconds=timeout_s))
    answer = json.loads(store.get(key))
    if "error" in answer:
        raise CheckpointError(answer["error"])
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
    """The newest commit, local or in `storage`, whose checksums match, and one line per newer commit skipped.

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
    for step in sorted(local.keys() | remote, reverse=True):
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


def _set_aside(commit: Commit) -> None:
    place = commit.folder.with_name(f"{commit.folder.name}.damaged")
    number = 1
    while place.exists():
        number += 1
        place = commit.folder.with_name(f"{commit.folder.name}.damaged{number}")
    commit.folder.rename(place)
