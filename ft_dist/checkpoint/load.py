"""Read a commit into an engine of any world size and ZeRO stage: each rank picks the slices that it owns now."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ft_dist.checkpoint.format import Commit, commits, verify
from ft_dist.engine.fragments import Fragment, ensure_moments, fragments, refresh_compute_weights, set_adam_step
from ft_dist.engine.step import Engine
from ft_dist.errors import CheckpointError


def newest_intact(root: Path) -> tuple[Commit | None, list[str]]:
    """The newest commit whose checksums hold, and a line for each newer one that was passed over."""
    passed_over = []
    for commit in reversed(commits(root)):
        try:
            verify(commit)
        except CheckpointError as error:
            passed_over.append(str(error))
            continue
        return commit, passed_over
    return None, passed_over


def load(engine: Engine, commit: Commit) -> dict[str, Any]:
    """Fill master weights and optimizer state from `commit`; returns the loop's state. All ranks call it.

    Raises CheckpointError if the commit was made for other trainable parameters.
    """
    state = commit.state()
    _check_parameters(engine, commit, state)
    pieces = _Pieces(commit)
    ensure_moments(engine)
    for fragment in fragments(engine):
        for kind, tensor in fragment.tensors.items():
            pieces.copy_into(tensor, kind, fragment)
    set_adam_step(engine, state["adam_step"])
    refresh_compute_weights(engine)
    return state


def _check_parameters(engine: Engine, commit: Commit, state: dict[str, Any]) -> None:
    saved = {name: tuple(shape) for name, shape in state["parameters"].items()}
    wanted = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.trainable()}
    if saved == wanted:
        return
    differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    name = differing[0]
    raise CheckpointError(
        f"{commit.folder}: holds other trainable parameters than this config trains; {name} is "
        f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here ({len(differing)} differ). Resume "
        "with the model and method that the run began with, or use another output_dir."
    )


class _Pieces:
    """Index of a commit's fragments: parameter and kind -> ranges, each in a memory-mapped file."""

    def __init__(self, commit: Commit) -> None:
        self.folder = commit.folder
        self.ranges: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for path in commit.fragment_files():
            handle = safe_open(path, framework="pt")
            for key in handle.keys():  # noqa: SIM118 - not a dictionary
                kind, _, rest = key.partition("/")
                name, _, start = rest.rpartition("@")
                numel = handle.get_slice(key).get_shape()[0]
                self.ranges[kind, name].append((int(start), numel, handle, key))

    @torch.no_grad()
    def copy_into(self, tensor: torch.Tensor, kind: str, fragment: Fragment) -> None:
        """Fill the flat `tensor` with elements [fragment.start, fragment.start + fragment.numel)."""
        filled, end = 0, fragment.start + fragment.numel
        for start, numel, handle, key in self.ranges[kind, fragment.name]:
            low, high = max(start, fragment.start), min(start + numel, end)
            if low >= high:
                continue
            values = handle.get_slice(key)[low - start : high - start]
            tensor[low - fragment.start : high - fragment.start].copy_(values)
            filled += high - low
        if filled != fragment.numel:
            raise CheckpointError(
                f"{self.folder}: {kind} of {fragment.name} covers {filled} of {fragment.numel} elements."
            )
