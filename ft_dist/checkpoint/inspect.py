"""List, show, verify and compare checkpoints, for the command line. No torch, no engine."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from ft_dist.checkpoint.commit.format import (
    MANIFEST,
    STATE,
    Commit,
    check_fingerprint,
    commits,
    open_tensors,
    parse_manifest,
    split_key,
    step_name,
    step_of,
    verify,
)
from ft_dist.checkpoint.commit.lease import remote_steps
from ft_dist.checkpoint.identity import config_changes
from ft_dist.checkpoint.state import RunState
from ft_dist.errors import CheckpointError, MissingFileError
from ft_dist.run_folder import RunFolder
from ft_dist.storage import Log, Storage, is_url, open_storage
from ft_dist.storage.files import PART_BYTES

ANSWER_S = 60.0
"""How long a store may take to answer; nothing is lost if a command gives up"""


def find_commits(place: Path) -> list[Commit]:
    """The commits in a run folder, its `checkpoints/`, or one commit's own folder; oldest first.

    Raises CheckpointError if there is none.
    """
    for root in (place, RunFolder(place).checkpoints):
        if found := commits(root):
            return found
    found = [commit for commit in commits(place.parent) if commit.folder.name == place.resolve().name]
    if not found:
        raise CheckpointError(f"{place}: holds no checkpoint. Name a run folder, or a folder such as step-00000100.")
    return found


def listing(place: Path) -> list[dict[str, Any]]:
    """One entry per commit: step, bytes, ranks and ZeRO stage that saved it, training and held-out loss."""
    return [_summary(commit) for commit in find_commits(place)]


def details(place: Path) -> dict[str, Any]:
    """The newest commit at `place`: its summary, state without the config tree, and elements by kind of tensor."""
    commit = find_commits(place)[-1]
    state = RunState.from_dict(commit.state(), where=commit.folder / STATE).to_dict()
    kinds: Counter[str] = Counter()
    for handle, key in _tensors(commit):
        kinds[split_key(key)[0]] += handle.get_slice(key).get_shape()[0]
    shapes = state.pop("parameters")
    config = state.pop("config", None)
    return _summary(commit) | {
        "files": commit.manifest()["files"],
        "elements": dict(sorted(kinds.items())),
        "parameters": shapes,
        "state": state,
        "config": config,
    }


def verified(place: str, *, log: Log | None = None) -> list[dict[str, Any]]:
    """Every commit at `place` (a path, or the URL of a mirror) with every byte read: `problem` is None or the first
    fault.

    `log` receives a line while a store does not answer. Raises CheckpointError if there is no commit, StorageError.
    """
    storage = open_storage(place, wait_s=ANSWER_S, limit=None, log=log) if is_url(place) else None
    if storage and not storage.local:
        return _verified_remotely(storage)
    found = []
    for commit in find_commits(storage.local if storage and storage.local else Path(place)):
        found.append(_checked(str(commit.folder), commit.step, partial(verify, commit)))
    return found


def _verified_remotely(storage: Storage) -> list[dict[str, Any]]:
    steps = remote_steps(storage)
    if not steps:  # the URL may name one commit
        step = step_of(storage.url.rpartition("/")[2])
        if step is None or not storage.exists(MANIFEST):
            raise CheckpointError(
                f"{storage.url}: holds no checkpoint. Name the checkpoint.path of a run, or a step-N folder in it."
            )
        return [_checked(storage.url, step, partial(_verify_remote, storage, "", step))]
    return [
        _checked(storage.url_of(step_name(step)), step, partial(_verify_remote, storage, f"{step_name(step)}/", step))
        for step in steps
    ]


def _verify_remote(storage: Storage, folder: str, step: int) -> None:
    """Read the commit at `folder` (empty, or ending in /) without storing it.

    Raises CheckpointError or MissingFileError naming the first object that is missing or damaged, StorageError.
    """
    where = storage.url_of(f"{folder}{MANIFEST}")
    manifest = parse_manifest(storage.read_bytes(f"{folder}{MANIFEST}"), where)
    if manifest["step"] != step:
        raise CheckpointError(f"{where}: belongs to step {manifest['step']}.")
    for name, expected in manifest["files"].items():
        file, digest = f"{folder}{name}", xxhash.xxh3_128()
        size = storage.size(file)
        if size == expected["bytes"]:
            for start in range(0, size, PART_BYTES):
                digest.update(storage.read_range(file, start, min(start + PART_BYTES, size)))
        check_fingerprint(storage.url_of(file), {"bytes": size, "xxh3": digest.hexdigest()}, expected)


def _checked(folder: str, step: int, check: Callable[[], None]) -> dict[str, Any]:
    try:
        check()
        problem = None
    except (CheckpointError, MissingFileError) as error:
        problem = str(error)
    return {"folder": folder, "step": step, "problem": problem}


def compared(first: Path, second: Path) -> dict[str, Any]:
    """How two commits differ: config keys, parameters, and the largest absolute difference per kind of tensor."""
    one, two = find_commits(first)[-1], find_commits(second)[-1]
    before, after = (RunState.from_dict(commit.state()) for commit in (one, two))
    names = before.parameters, after.parameters
    common = {name for name in names[0] if names[0][name] == names[1].get(name)}
    changes = config_changes(before.config or {}, after.config or {})
    largest = {kind: _largest_difference(one, two, kind, common) for kind in sorted(_kinds(one) & _kinds(two))}
    return {
        "first": str(one.folder),
        "second": str(two.folder),
        "config": {key: list(pair) for key, pair in changes.items()},
        "position": {key: [getattr(before, key), getattr(after, key)] for key in ("step", "tokens", "loss")},
        "parameters": sorted(name for name in {**names[0], **names[1]} if name not in common),
        "tensors": largest,
    }


def _summary(commit: Commit) -> dict[str, Any]:
    try:
        state, size = RunState.from_dict(commit.state()), commit.size_bytes()
    except CheckpointError as error:
        return {"folder": str(commit.folder), "step": commit.step, "problem": str(error)}
    keys = ("world_size", "zero_stage", "loss", "tokens")
    summary = {"folder": str(commit.folder), "step": commit.step, "bytes": size}
    scores = {"held_out_loss": state.to_dict()["held_out_losses"].get(commit.step)}
    return summary | {key: getattr(state, key) for key in keys} | scores | {"problem": None}


def _tensors(commit: Commit) -> Iterator[tuple[Any, str]]:
    for path in commit.fragment_files():
        handle = open_tensors(path, framework="numpy")
        for key in handle.keys():  # noqa: SIM118 - not a dictionary
            yield handle, key


def _kinds(commit: Commit) -> set[str]:
    return {split_key(key)[0] for _, key in _tensors(commit)}


def _largest_difference(one: Commit, two: Commit, kind: str, names: set[str]) -> dict[str, Any]:
    """Compare one kind of tensor at a time, which limits the memory to one copy of the weights per side."""
    import numpy as np

    left, right = _whole(one, kind, names), _whole(two, kind, names)
    largest, where, equal = 0.0, None, 0
    for name in sorted(left.keys() & right.keys()):
        if left[name].shape != right[name].shape:
            largest, where = float("inf"), name
            continue
        difference = float(np.abs(left[name] - right[name]).max(initial=0.0))
        equal += bool((left[name] == right[name]).all())
        if difference > largest or difference != difference:
            largest, where = difference, name
    return {"largest": largest, "in": where, "equal": equal, "of": len(left.keys() & right.keys())}


def _whole(commit: Commit, kind: str, names: set[str]) -> dict[str, Any]:
    import numpy as np

    pieces: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for handle, key in _tensors(commit):
        of_kind, name, start = split_key(key)
        if of_kind == kind and name in names:
            pieces[name].append((start, handle.get_tensor(key).astype(np.float64)))
    ordered = {name: sorted(parts, key=lambda part: part[0]) for name, parts in pieces.items()}
    return {name: np.concatenate([values for _, values in parts]) for name, parts in ordered.items()}


def table(entries: list[dict[str, Any]]) -> str:
    """`listing` as a table."""
    lines = [f"{'step':>10}  {'size':>10}  {'ranks':>5}  {'ZeRO':>4}  {'loss':>8}  {'held-out':>8}  folder"]
    for entry in entries:
        if entry["problem"]:
            lines.append(f"{entry['step']:>10}  damaged: {entry['problem']}")
            continue
        loss, held_out = ("-" if entry[key] is None else f"{entry[key]:.4f}" for key in ("loss", "held_out_loss"))
        size, ranks, stage = f"{entry['bytes'] / 1e6:,.1f} MB", entry["world_size"] or "-", entry["zero_stage"]
        stage = "-" if stage is None else stage
        lines.append(
            f"{entry['step']:>10}  {size:>10}  {ranks:>5}  {stage:>4}  {loss:>8}  {held_out:>8}  {entry['folder']}"
        )
    return "\n".join(lines)


def as_text(entry: dict[str, Any]) -> str:
    """`details` or `compared` as indented lines: JSON without its punctuation."""
    return "\n".join(_lines(entry))


def _lines(tree: dict[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
