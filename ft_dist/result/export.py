"""Export a finished run to a folder that plain transformers and peft load: a merged model, or the adapter alone."""

import shutil
from pathlib import Path
from typing import Any, Literal

from ft_dist.errors import ModelError
from ft_dist.model.builtin import Progress
from ft_dist.model.folder import whole_folder
from ft_dist.model.quiet import quietly
from ft_dist.model.tokenizer import load_tokenizer, stop_token_ids
from ft_dist.result.load import Weights, find_weights, load_weights, tokenizer_folder


def export_run(
    run_dir: str | Path, *, kind: Literal["merged", "adapter"], to: str | Path, progress: Progress = print
) -> None:
    """Write the run's result into the new folder `to`, completely or not at all.

    merged: adapter and base are added in fp32 and rounded once to the run's dtype. adapter: a copy of `final/`.
    Raises ModelError if the run has not finished, `to` exists, or kind is adapter after full fine-tuning.
    """
    to = Path(to).expanduser()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ModelError(f"{to}: exists and is not an empty folder. Name a new folder.")
    weights = find_weights(str(run_dir), progress)
    if kind == "adapter" and weights.base is None:
        raise ModelError(f"{run_dir}: the run trained every weight, so it has no adapter. Use --to merged.")
    if not Path(weights.folder).is_dir():
        raise ModelError(f"{run_dir}: is not a folder on this machine. Name the folder of a finished run.")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(to) as temporary:
            if weights.base is None or kind == "adapter":
                shutil.copytree(weights.folder, temporary, dirs_exist_ok=True)
            else:
                _write_merged(weights, temporary)
    except OSError as error:
        raise ModelError(f"{to}: cannot be written ({error.strerror or error}).") from None


def _write_merged(weights: Weights, folder: Path) -> None:
    tokenizer, _ = load_tokenizer(tokenizer_folder(weights), trust_remote_code=weights.trust_remote_code)
    model = merge(weights, vocabulary=len(tokenizer))
    own = model.generation_config
    stops = stop_token_ids(tokenizer, own.eos_token_id)
    own.eos_token_id, own.pad_token_id = stops[0] if len(stops) == 1 else stops, tokenizer.pad_token_id
    with quietly():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def merge(weights: Weights, *, vocabulary: int) -> Any:
    """The base with the adapter merged (LoRA, rsLoRA, DoRA, trained token rows), in the run's dtype."""
    import torch

    from ft_dist.result.untie import untie_where_adapted

    adapted = load_weights(weights, dtype=torch.float32, vocabulary=vocabulary)
    untie_where_adapted(adapted)
    model = adapted.merge_and_unload(safe_merge=True)
    model.config.use_cache = True  # training runs without a cache, but generation needs one
    return model.to(_export_dtype(weights))


def _export_dtype(weights: Weights) -> Any:
    """The run's dtype; for an adapter without a run, that of its base."""
    import torch
    from transformers import AutoConfig

    if weights.config is not None:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[weights.config.model.dtype]
    return AutoConfig.from_pretrained(weights.base).dtype or torch.float32
