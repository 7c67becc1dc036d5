"""`ft-dist checkpoint import`: a checkpoint of another trainer becomes the first commit of a run."""

import json
from pathlib import Path

import torch

from ft_dist.checkpoint.commit import format as layout
from ft_dist.checkpoint.commit.lease import new_run_id
from ft_dist.checkpoint.commit.snapshot import HostBuffer
from ft_dist.checkpoint.foreign.read import read_foreign
from ft_dist.checkpoint.identity import base_model, identity
from ft_dist.checkpoint.run_record import run_id_of
from ft_dist.checkpoint.state import RunState
from ft_dist.config import RunConfig
from ft_dist.errors import CheckpointError
from ft_dist.model.builtin import local_folder, resolve_model
from ft_dist.model.load import load_model
from ft_dist.model.parts.layers import layers_of
from ft_dist.model.quiet import quiet_process, quietly
from ft_dist.model.tokenizer import configured_tokenizer, new_token_ids
from ft_dist.resources import versions
from ft_dist.run_folder import RunFolder


def import_checkpoint(config: RunConfig, folder: Path) -> layout.Commit:
    """Import weights, AdamW's state and the step from `folder` into the run of `config`, which resumes from there.

    The other trainer's position in its data is unknown, so the run starts at the first sample of its order.
    Raises CheckpointError if the folder does not match the config, or if the run already has commits.
    """
    root = RunFolder(config.run_dir).checkpoints
    if layout.remains(root):
        raise CheckpointError(f"{root}: already has checkpoints. Import into another output_dir.")
    quiet_process()
    model_folder = resolve_model(config.model.path)
    shapes = _trainable_shapes(config, model_folder)
    found = read_foreign(folder, shapes, no_decay=config.optim.weight_decay > 0)
    run_id = run_id_of(RunFolder(config.run_dir)) or new_run_id()
    state = RunState(
        step=found.step,
        adam_step=found.adam_step,
        parameters=shapes,
        imported_from=str(folder),
        versions=versions(),
        run_id=run_id,
        **identity(config, base=base_model(config, local_folder(model_folder, config.model.revision))),
    )
    staging = root / f"{layout.step_name(found.step)}.importing"
    staging.mkdir(parents=True, exist_ok=True)
    tensors = {f"{kind}/{name}@0": tensor for name, kinds in found.tensors.items() for kind, tensor in kinds.items()}
    name = layout.rank_name(0)
    files = {name: HostBuffer(torch.device("cpu")).snapshot(tensors).write(staging / name)}
    files[layout.STATE] = layout.write_synced(staging / layout.STATE, json.dumps(state.to_dict(), indent=1))
    layout.write_manifest(staging, found.step, files)
    layout.publish(staging, layout.step_folder(root, found.step))
    return layout.Commit(layout.step_folder(root, found.step), found.step)


def _trainable_shapes(config: RunConfig, folder: str) -> dict[str, list[int]]:
    """Names and shapes of the parameters that a run of this config trains, from the model itself."""
    tokenizer, _ = configured_tokenizer(config.model, folder)
    with quietly():
        model, _ = load_model(config.model, folder=folder, vocabulary=len(tokenizer))
        model = config.method.adapt(model, layers_of(model), new_token_ids=new_token_ids(config.model, tokenizer))
    return {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
