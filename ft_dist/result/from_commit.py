"""Write the weights of a commit as a folder in the form of `final/`."""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ft_dist.checkpoint.commit.format import STATE, Commit
from ft_dist.checkpoint.identity import base_model, check_identity, identity
from ft_dist.checkpoint.load import SavedFragments
from ft_dist.checkpoint.state import RunState
from ft_dist.config import RunConfig
from ft_dist.engine.build import freeze_other_parts
from ft_dist.engine.save_pretrained import save_model, saved_buffers
from ft_dist.errors import CheckpointError
from ft_dist.model.builtin import local_folder
from ft_dist.model.load import DTYPES, load_model
from ft_dist.model.parts.layers import layers_of
from ft_dist.model.quiet import quietly
from ft_dist.model.tokenizer import configured_tokenizer, new_token_ids


def write_commit(commit: Commit, config: RunConfig, folder: Path, *, base: str) -> None:
    """Write the adapter or model of `commit`, in `model.dtype`, with its tokenizer into `folder`.

    The model in the folder (or hub id) `base` supplies what a run does not train: the config, buffers, frozen parts.
    Raises CheckpointError if the commit does not fit it, ModelError.
    """
    state = RunState.from_dict(commit.state(), where=commit.folder / STATE)
    if state.config is not None:
        check_identity(
            state.identity,
            identity(config, base=base_model(config, local_folder(base, config.model.revision))),
            where=commit.folder,
        )
    tokenizer, _ = configured_tokenizer(config.model, base)
    with quietly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in training, which ignores them for the whole process
        # this machine may lack the attention that the run used, and no forward pass runs
        plain = config.model.model_copy(update={"attention": "auto"})
        model, _ = load_model(plain, folder=base, vocabulary=len(tokenizer))
        freeze_other_parts(model)
        model = config.method.adapt(model, layers_of(model), new_token_ids=new_token_ids(config.model, tokenizer))
        weights = dict(saved_buffers(model, trained_only=config.method.frozen_base))
        if not config.method.frozen_base:
            weights |= {name: parameter.detach() for name, parameter in model.named_parameters()}
        try:
            weights |= _trained(model, commit, state, DTYPES[config.model.dtype])
        except (OSError, SafetensorError) as error:  # the run deletes old commits
            raise CheckpointError(f"{commit.folder}: cannot be read ({error}).") from None
        save_model(model, tokenizer, folder, weights=weights, base=config.model.path)


def _trained(model: Any, commit: Commit, state: RunState, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The trained parameters by name: the saved fp32 weights, rounded to `dtype` as in training."""
    saved = SavedFragments(commit.fragment_files())
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if differing := sorted(
        name for name in {**shapes, **state.parameters} if shapes.get(name) != state.parameters.get(name)
    ):
        raise CheckpointError(
            f"{commit.folder}: its parameters differ from those of the run's config and model: {differing[0]} is "
            f"{state.parameters.get(differing[0], 'absent')} there and {shapes.get(differing[0], 'absent')} here."
        )
    weights = {}
    for name, shape in shapes.items():
        whole = torch.empty(shape, dtype=torch.float32)
        if saved.copy_into(whole.view(-1), "master", name, start=0) != whole.numel():
            raise CheckpointError(f"{commit.folder}: does not hold all of {name}. It was not saved by ft_dist.")
        weights[name] = whole.to(dtype)
    return weights
