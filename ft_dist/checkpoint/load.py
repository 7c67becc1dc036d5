"""Load a commit into an engine of any world size and ZeRO stage: each rank reads the slices that it owns."""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ft_dist.checkpoint.commit.format import STATE, Commit, open_tensors, split_key
from ft_dist.checkpoint.state import RunState
from ft_dist.engine.fragments import fragments, refresh_compute_weights, set_adam_step
from ft_dist.engine.step import Engine
from ft_dist.errors import NEW_RUN, CheckpointError


def load(engine: Engine, commit: Commit) -> RunState:
    """Load master weights and optimizer state from `commit`; returns its state. All ranks call it.

    Raises CheckpointError if the commit has other trainable parameters or another optimizer's state.
    """
    state = RunState.from_dict(commit.state(), where=commit.folder / STATE)
    _check_parameters(engine, commit, state)
    saved = SavedFragments(commit.fragment_files())
    for fragment in fragments(engine):
        segment = fragment.segment
        for kind, place in fragment.tensors.items():
            tensor = place if isinstance(place, torch.Tensor) else place.read()
            filled = saved.copy_into(tensor, kind, segment.name, start=segment.start)
            if filled != segment.numel:
                raise CheckpointError(
                    f"{commit.folder}: {kind} of {segment.name} covers {filled} of {segment.numel} elements from "
                    f"{segment.start}, so it was saved with another optimizer. Restore optim.kind, or {NEW_RUN}."
                )
            if not isinstance(place, torch.Tensor):
                place.write(tensor)
    set_adam_step(engine, state.adam_step)
    refresh_compute_weights(engine)
    return state


def _check_parameters(engine: Engine, commit: Commit, state: RunState) -> None:
    saved = {name: tuple(shape) for name, shape in state.parameters.items()}
    wanted = {name: tuple(shape) for name, shape in engine.trainable_shapes().items()}
    if saved == wanted:
        return
    differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    name = differing[0]
    raise CheckpointError(
        f"{commit.folder}: its trainable parameters differ from this config's: {name} is {saved.get(name, 'absent')} "
        f"there and {wanted.get(name, 'absent')} here ({len(differing)} differ). Resume with the model and method that "
        f"the run started with, or {NEW_RUN}."
    )


class SavedFragments:
    """Index of fragments: parameter and kind to ranges, each in a memory-mapped file."""

    def __init__(self, files: list[Path]) -> None:
        """Raises CheckpointError for a file that ft_dist did not write, StorageError for one that cannot be read."""
        self._ranges: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for path in files:
            handle = open_tensors(path, framework="pt")
            for key in handle.keys():  # noqa: SIM118 - not a dictionary
                kind, name, start = split_key(key)
                self._ranges[kind, name].append((start, handle.get_slice(key).get_shape()[0], handle, key))
        for (kind, name), ranges in self._ranges.items():
            ranges.sort(key=lambda each: each[0])
            for (first, numel, *_), (second, *_) in pairwise(ranges):
                if first + numel > second:
                    raise CheckpointError(
                        f"{files[0].parent}: holds {kind} of {name} twice from entry {second}. Another program wrote "
                        "this checkpoint."
                    )

    @torch.no_grad()
    def copy_into(self, tensor: torch.Tensor, kind: str, name: str, *, start: int) -> int:
        """Fill the flat `tensor` with elements [start, start + numel); returns the number found."""
        filled, end = 0, start + tensor.numel()
        for saved_start, numel, handle, key in self._ranges[kind, name]:
            low, high = max(saved_start, start), min(saved_start + numel, end)
            if low >= high:
                continue
            values = handle.get_slice(key)[low - saved_start : high - saved_start]
            tensor[low - start : high - start].copy_(values)
            filled += high - low
        return filled
