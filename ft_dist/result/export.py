"""Export a finished run to a folder that plain transformers and peft load: a merged model, or the adapter alone."""

import shutil
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from ft_dist.checkpoint.find import Step
from ft_dist.errors import ModelError
from ft_dist.model.builtin import Progress
from ft_dist.model.folder import whole_folder
from ft_dist.model.tokenizer import load_tokenizer, stop_token_ids
from ft_dist.outside import expand_home
from ft_dist.result.load import Weights, not_written, tokenizer_folder, trained_weights


def export_run(
    run_dir: str | Path,
    *,
    kind: Literal["merged", "adapter"],
    to: str | Path,
    step: Step | None = None,
    dtype: Literal["bf16", "fp32"] | None = None,
    trust_remote_code: bool = False,
    progress: Progress = print,
) -> None:
    """Write the run's result, or its commit of `step`, into the new folder `to`, completely or not at all.

    merged: adapter and base are added in fp32 and rounded once, to the run's dtype or `dtype`; the folder is loaded
    again and compared with base + adapter. adapter: a copy of `final/`. Raises ModelError if the run has not finished,
    `to` exists, kind is adapter after full fine-tuning, nothing is merged but `dtype` is set, or the check fails, and
    CheckpointError if there is no such commit.
    """
    to = expand_home(to, error=ModelError)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ModelError(f"{to}: exists and is not an empty folder. Name a new folder.")
    near = next(parent for parent in to.absolute().parents if parent.is_dir())
    options: Any = {"near": near, "trust_remote_code": trust_remote_code, "progress": progress}
    with trained_weights(str(run_dir), step=step, **options) as weights:
        _export(weights, run_dir, kind, to, dtype, progress)


def _export(
    weights: Weights,
    run_dir: str | Path,
    kind: str,
    to: Path,
    dtype: Literal["bf16", "fp32"] | None,
    progress: Progress,
) -> None:
    if kind == "adapter" and weights.base is None:
        raise ModelError(f"{run_dir}: the run trained every weight, so it has no adapter. Use --to merged.")
    if not Path(weights.folder).is_dir():
        raise ModelError(f"{run_dir}: is not a folder on this machine. Name the folder of a finished run.")
    if dtype and (kind == "adapter" or weights.base is None):
        raise ModelError(f"--dtype={dtype}: nothing is merged here, so the weights keep their dtype. Remove --dtype.")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(to) as temporary:
            if weights.base is None or kind == "adapter":
                shutil.copytree(weights.folder, temporary, dirs_exist_ok=True)
            else:
                _write_merged(weights, temporary, dtype, progress)
    except (OSError, SafetensorError) as error:
        raise not_written(to, error) from None


def _write_merged(weights: Weights, folder: Path, dtype: Literal["bf16", "fp32"] | None, progress: Progress) -> None:
    from ft_dist.engine.save_pretrained import save_model
    from ft_dist.model.load import DTYPES
    from ft_dist.result.merge import merge, prove_merged

    tokenizer, _ = load_tokenizer(tokenizer_folder(weights), trust_remote_code=weights.trust_remote_code)
    model = merge(weights, vocabulary=len(tokenizer), dtype=DTYPES[dtype] if dtype else None)
    own = model.generation_config
    stops = stop_token_ids(tokenizer, own.eos_token_id)
    own.eos_token_id, own.pad_token_id = stops[0] if len(stops) == 1 else stops, tokenizer.pad_token_id
    for note in save_model(model, tokenizer, folder):
        progress(note)
    del model
    progress(prove_merged(weights, folder, tokenizer=tokenizer))
