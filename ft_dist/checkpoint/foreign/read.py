"""Reads checkpoints of DeepSpeed (ZeRO 0-3) and of Hugging Face's Trainer into our format.

Pickles go through torch's restricted unpickler only, which allows a few plain DeepSpeed classes by name, so no file can
execute code. DeepSpeed's own readers (`zero_to_fp32`, universal checkpoints) unpickle anything, so this module reads
the layout itself: https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/utils/zero_to_fp32.py.
"""

import json
import math
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ft_dist.errors import CheckpointError

KINDS = ("master", "exp_avg", "exp_avg_sq")
_PREFIXES = ("module.", "model.", "_orig_mod.")


@dataclass
class Foreign:
    """Flat fp32 tensors by parameter name and kind, the `step`, and the optimizer's own step count."""

    step: int
    adam_step: int
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def read_foreign(folder: Path, shapes: Mapping[str, Sequence[int]], *, no_decay: bool) -> Foreign:
    """Read the checkpoint in `folder` for parameters of these names and shapes, in the model's order.

    `no_decay`: the optimizer had a separate group for vectors (weight decay on matrices only). Raises CheckpointError
    for a folder of neither kind, a pickle that needs more than tensors, or other parameters.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder.")
    latest = folder / "latest"
    place = folder / latest.read_text().strip() if latest.is_file() else folder
    if list(place.glob("*_optim_states.pt")) or list(place.glob("mp_rank_*_model_states.pt")):
        found = _read_deepspeed(place, shapes, no_decay=no_decay)
    elif (place / "trainer_state.json").is_file():
        found = _read_trainer(place, shapes, no_decay=no_decay)
    else:
        raise CheckpointError(
            f"{folder}: neither a DeepSpeed checkpoint (mp_rank_00_model_states.pt, *_optim_states.pt) nor one of "
            "Hugging Face's Trainer (trainer_state.json, optimizer.pt)."
        )
    found.tensors = _by_our_names(place, found.tensors, shapes)
    return found


def _read_deepspeed(folder: Path, shapes: Mapping[str, Sequence[int]], *, no_decay: bool) -> Foreign:
    partitions = [_load(path) for path in sorted(folder.glob("*_optim_states.pt"), key=_rank_of)]
    models = sorted(folder.glob("*model_states.pt"), key=_rank_of)
    if not models:
        raise CheckpointError(f"{folder}: has no *model_states.pt.")
    model = _load(models[0])
    if not partitions:
        return _read_replicated(folder, model, shapes, no_decay=no_decay)
    states = [partition["optimizer_state_dict"] for partition in partitions]
    stage = int(states[0]["zero_stage"])
    count = states[0].get("partition_count", len(states))
    expected = max(count) if isinstance(count, list) else count
    if len(states) != expected:
        raise CheckpointError(f"{folder}: {len(states)} of {expected} *_optim_states.pt exist. Copy the missing ones.")
    found = Foreign(model["global_steps"], 0)
    if stage == 3:
        # its groups are split into sub-groups in the order of the parameters: treat them as one list
        groups = [{name: shape for group in model["param_shapes"] for name, shape in group.items()}]
        cut, fp32, base = _cut_interleaved, "fp32_flat_groups", "optimizer_state_dict"
    else:
        groups = model["param_shapes"]
        cut, fp32, base = _cut_consecutive, "single_partition_of_fp32_groups", "base_optimizer_state"
    for index, of_group in enumerate(groups):
        flats = range(len(states[0][fp32])) if stage == 3 else (index,)
        for kind in KINDS:
            parts = [torch.cat([_flat(state, fp32, base, kind, flat) for flat in flats]) for state in states]
            for name, tensor in cut(folder, parts, of_group):
                found.tensors.setdefault(name, {})[kind] = tensor
    found.adam_step = int(next(iter(states[0][base]["state"].values())).get("step", found.step))
    return found


def _flat(state: dict[str, Any], fp32: str, base: str, kind: str, index: int) -> torch.Tensor:
    tensor = state[fp32][index] if kind == "master" else state[base]["state"][index][kind]
    return tensor.reshape(-1).float()


def _cut_consecutive(folder: Path, parts: list[torch.Tensor], shapes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Stages 1 and 2: the ranks' parts in sequence are the parameters in sequence, then padding."""
    whole, at = torch.cat(parts), 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        if at + numel > whole.numel():
            raise CheckpointError(f"{folder}: {name} ends at {at + numel} of {whole.numel()} elements.")
        yield name, whole[at : at + numel]
        at += numel


def _cut_interleaved(folder: Path, parts: list[torch.Tensor], shapes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Stage 3: every rank holds an equal slice of each parameter, the last ones padded."""
    at = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        width = -(-numel // len(parts))
        if at + width > parts[0].numel():
            raise CheckpointError(f"{folder}: {name} ends at {at + width} of {parts[0].numel()} elements per rank.")
        yield name, torch.cat([part[at : at + width] for part in parts])[:numel]
        at += width


def _read_replicated(
    folder: Path, model: dict[str, Any], shapes: Mapping[str, Sequence[int]], *, no_decay: bool
) -> Foreign:
    """Stage 0: whole tensors; the optimizer numbers its parameters by group, in the order of the model."""
    if not model["optimizer"] or "state" not in model["optimizer"]:
        raise CheckpointError(f"{folder}: its optimizer state is missing.")
    weights = {_our_name(name, shapes): tensor for name, tensor in model["module"].items()}
    return _numbered(
        folder, weights, model["optimizer"]["state"], shapes, no_decay=no_decay, step=model["global_steps"]
    )


def _read_trainer(folder: Path, shapes: Mapping[str, Sequence[int]], *, no_decay: bool) -> Foreign:
    """Weights from safetensors; optimizer.pt numbers parameters by group: decayed matrices first, then the rest."""
    from safetensors.torch import load_file

    step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
    files = sorted(folder.glob("adapter_model.safetensors")) or sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder}: no adapter_model.safetensors or model.safetensors; pickled weights are not read."
        )
    weights = {name: tensor for path in files for name, tensor in load_file(path).items()}
    # an adapter's file omits the adapter's name
    ours = {name.replace(".default.", "."): name for name in shapes}
    named = {ours[name]: tensor for name, tensor in weights.items() if name in ours}
    if not (folder / "optimizer.pt").is_file():
        raise CheckpointError(f"{folder}: no optimizer.pt. Start from its weights with model.path instead.")
    optimizer = _load(folder / "optimizer.pt")
    return _numbered(folder, named, optimizer["state"], shapes, no_decay=no_decay, step=step)


def _numbered(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    state: Mapping[int, Any],
    shapes: Mapping[str, Sequence[int]],
    *,
    no_decay: bool,
    step: int,
) -> Foreign:
    """Weights by name, optimizer states by number: matrices first if vectors are a separate group."""
    order = sorted(shapes, key=lambda name: no_decay and len(shapes[name]) < 2)
    if missing := [name for name in order if name not in weights]:
        raise CheckpointError(f"{folder}: has no {missing[0]} ({len(missing)} of {len(order)} parameters are missing).")
    if len(state) != len(order):
        raise CheckpointError(f"{folder}: its optimizer has {len(state)} parameters, but {len(order)} are trained.")
    found = Foreign(step, step)
    for name, (_, kept) in zip(order, sorted(state.items()), strict=True):
        found.adam_step = int(kept.get("step", step))
        for kind in KINDS:
            tensor = weights[name] if kind == "master" else kept.get(kind)
            if tensor is None or list(tensor.shape) != list(shapes[name]):
                raise CheckpointError(
                    f"{folder}: no {kind} of shape {tuple(shapes[name])} for {name}. Only AdamW's state is read, in "
                    "the order of the model's parameters; with optim.weight_decay > 0, vectors are a separate group."
                )
            found.tensors.setdefault(name, {})[kind] = tensor.reshape(-1).float()
    return found


def _by_our_names(
    folder: Path, tensors: dict[str, dict[str, torch.Tensor]], shapes: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, torch.Tensor]]:
    renamed = {_our_name(name, shapes): kinds for name, kinds in tensors.items()}
    for name, shape in shapes.items():
        if name not in renamed:
            raise CheckpointError(
                f"{folder}: does not train {name}, but the config does. It trains {len(renamed)} parameters, for "
                f"example {next(iter(renamed), 'none')}; the config trains {len(shapes)}. Use the model and "
                "method of the checkpoint."
            )
        if renamed[name]["master"].numel() != math.prod(shape):
            raise CheckpointError(
                f"{folder}: {name} has {renamed[name]['master'].numel()} elements there and {math.prod(shape)} here."
            )
    return {name: renamed[name] for name in shapes}


def _our_name(name: str, shapes: Mapping[str, Any]) -> str:
    """`name` without the prefixes of wrappers, if that gives a known parameter."""
    while name not in shapes:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return name
        name = name.removeprefix(prefix)
    return name


def _rank_of(path: Path) -> tuple[int, str]:
    digits = "".join(part for part in path.name.split("_mp_rank")[0] if part.isdigit())
    return int(digits or 0), path.name


def _load(path: Path) -> Any:
    """Only the tensors and plain containers of a pickle. Raises CheckpointError."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    harmless = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).split("\n")[0])
        raise CheckpointError(f"{path}: refused or damaged: it holds more than tensors ({reason.strip()}).") from None
