"""Finds the commit that a run resumes from, the best, or that of a step; see `agreed.py` for several ranks."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from ft_dist.checkpoint.commit.format import (
    MANIFEST,
    Commit,
    commits,
    named_commit,
    remains,
    set_aside,
    step_of,
    verify,
)
from ft_dist.checkpoint.commit.lease import remote_steps
from ft_dist.checkpoint.commit.mirror import fetch
from ft_dist.checkpoint.commit.retention import by_loss
from ft_dist.checkpoint.state import RunState
from ft_dist.errors import NEW_RUN, CheckpointError, CheckpointVersionError, StorageError
from ft_dist.storage import Storage

Step = int | Literal["best"]


def restarted() -> bool:
    """Whether a launcher, torchrun or SLURM has started this run again by itself."""
    counts = {"FT_DIST_ROUND": 1, "TORCHELASTIC_RESTART_COUNT": 0, "SLURM_RESTART_COUNT": 0}
    found = ((os.environ.get(name, ""), first) for name, first in counts.items())
    return any(value.isdecimal() and int(value) > first for value, first in found)


def find(*, resume: str, root: Path, storage: Storage | None = None) -> tuple[Commit | None, list[str]]:
    """The commit that `checkpoint.resume` selects, and one line per skipped commit.

    A path counts until the run has a commit of its own; so does `never` if the run is `restarted`. Raises
    CheckpointError, StorageError.
    """
    if resume == "auto" or (resume == "never" and restarted()):
        return newest_intact(root, storage)
    copies = remote_steps(storage) if storage else []
    if resume == "never":
        if storage and copies:
            raise CheckpointError(
                f"checkpoint.resume=never, but {storage.url} holds copies of an earlier run in this output_dir. Use "
                "another checkpoint.path, or checkpoint.resume=auto to continue that run."
            )
        return None, []
    if remains(root) or copies:
        commit, skipped = newest_intact(root, storage)
        return commit, [f"{resume}: checkpoint.resume is not used, since the run has commits of its own", *skipped]
    commit = named_commit(Path(resume))
    try:
        verify(commit)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Name another checkpoint, or set checkpoint.resume=auto.") from None
    return commit, []


def newest_intact(root: Path, storage: Storage | None = None) -> tuple[Commit | None, list[str]]:
    """The newest commit, local or in `storage`, whose checksums match, and one line per newer commit skipped.

    None if there never was one. Raises CheckpointError if commits exist, but none can be used.
    """
    commit, skipped = first_intact(lambda steps: sorted(steps, reverse=True), root, storage)
    left = [] if commit else remains(root)
    if left or (skipped and commit is None):
        why = skipped[-1] if skipped else f"{left[-1]} has no {MANIFEST} or is damaged."
        raise CheckpointError(f"{root}: has checkpoints, but none that can be used: {why} Restore one, or {NEW_RUN}.")
    return commit, skipped


def newest_readable(root: Path) -> Commit | None:
    """Like `newest_intact` for one who only looks: of the files, state.json alone is read, and nothing is moved."""
    problem = ""
    for commit in reversed(commits(root)):
        try:
            verify(commit, state_only=True)
            return commit
        except CheckpointVersionError:
            raise
        except CheckpointError as error:
            problem = str(error)
    left = remains(root)
    if left:
        why = problem or f"{left[-1]} has no {MANIFEST} or is damaged."
        raise CheckpointError(f"{root}: has checkpoints, but none that can be used: {why} Restore one, or {NEW_RUN}.")
    return None


def first_intact(
    order: Callable[[Iterable[int]], list[int]], root: Path, storage: Storage | None
) -> tuple[Commit | None, list[str]]:
    """The first commit in the `order` of the steps found whose checksums match, and one line per commit skipped.

    A commit that is missing or damaged locally is downloaded from the store. Once another is found, a damaged local one
    is renamed to `step-N.damaged`: it can be inspected, but is neither found again nor counted by retention. A commit
    of another format version, and files that the file system does not read, are no damage: raises CheckpointError,
    StorageError.
    """
    skipped: list[str] = []
    damaged: list[Path] = []
    local = {commit.step: commit for commit in commits(root)}
    unsealed = {step: folder for folder in remains(root) if (step := step_of(folder.name)) and step not in local}
    remote: set[int] = set()
    if storage:
        try:
            remote = set(remote_steps(storage))
        except StorageError as error:
            if not local:
                raise
            skipped.append(f"{error} The newest local checkpoint is used.")
    found: Commit | None = None
    for step in order(local.keys() | unsealed.keys() | remote):
        if step in unsealed:
            skipped.append(f"{unsealed[step]}: has no {MANIFEST}, so it is not a whole commit.")
            damaged.append(unsealed[step])
        if step in local:
            try:
                verify(local[step])
                found = local[step]
                break
            except CheckpointVersionError:
                raise
            except CheckpointError as error:
                skipped.append(str(error))
                damaged.append(local[step].folder)
        if storage and step in remote:
            try:
                found = fetch(storage, step, root)
                damaged = [folder for folder in damaged if step_of(folder.name.partition(".")[0]) != step]
                break
            except CheckpointVersionError:
                raise
            except (CheckpointError, StorageError) as error:
                skipped.append(str(error))
    if found:
        for folder in damaged:
            set_aside(folder)
    return found, skipped


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
