"""Writes the result of a run as a folder that plain transformers (full) or peft (LoRA) loads.

The folder is written under a temporary name, read back and compared with the weights in memory, and renamed, so
`final/` is never incomplete.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ft_dist.distributed import max_over_ranks
from ft_dist.engine.digests import Digest, compare_files, persistent_buffers
from ft_dist.engine.step import Engine
from ft_dist.errors import StorageError, TrainingError, UserError
from ft_dist.model.folder import whole_folder
from ft_dist.model.quiet import quietly

Proof = Callable[[Path, Mapping[str, Digest], int], None]
"""Called on rank 0 with the folder before it becomes `final/`, the digests of the saved tensors by their names in the
model, and the bytes in its files; may raise TrainingError"""


def write_final(engine: Engine, tokenizer: Any, folder: Path, *, prove: Proof, advice: str) -> list[str]:
    """All ranks call it; rank 0 writes the adapter or the whole model, and the tokenizer. Returns notes for the user.

    Raises StorageError or TrainingError, on every rank, if the folder cannot be written or what it holds differs from
    the weights in memory; `advice` ends the message. An earlier `folder` is then left as it was.
    """
    weights = _gather(engine)
    notes: list[str] = []
    failure: UserError | TrainingError | None = None
    if engine.world.is_main:
        try:
            digests = {name: Digest.of(tensor) for name, tensor in weights.items()}
            folder.parent.mkdir(parents=True, exist_ok=True)
            with whole_folder(folder, replace=True) as partial:
                model, base = engine.objective.model, engine.config.model.path
                notes = save_model(model, tokenizer, partial, weights=weights, base=base)
                prove(partial, digests, compare_files(partial, _as_written(model, weights)))
        except Exception as error:  # any: the other ranks wait below
            failure = _explain(error, folder, advice)
    failed = max_over_ranks(0.0 if failure is None else 1.0 + isinstance(failure, UserError), engine.world)
    if failed:
        kind = StorageError if failed == 2.0 else TrainingError
        raise failure or kind(f"{folder}: rank 0 could not write it; its log says why")
    return notes


def save_model(
    model: Any, tokenizer: Any, folder: Path, *, weights: dict[str, torch.Tensor] | None = None, base: str | None = None
) -> list[str]:
    """Save a transformers or peft model, or only `weights` of it; returns notes on what was repaired.

    `base` is the `model.path` that an adapter's config names if its own is not a folder here. Raises OSError or
    SafetensorError if the folder cannot be written.
    """
    writes_generation_config = not hasattr(model, "peft_config") and model.can_generate()
    notes = repair_generation_config(model) if writes_generation_config else []
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    used = config.use_cache if hasattr(config, "use_cache") else None
    try:
        # training runs without a key-value cache, but generation from the result uses one
        config.use_cache = True
        with quietly():
            # a copy: transformers empties the dictionary
            model.save_pretrained(str(folder), state_dict=None if weights is None else dict(weights))
            _save_tokenizer(tokenizer, folder)
    finally:
        config.use_cache = used
    if base is not None:
        _name_base_model(folder, base)
    return notes


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raises OSError if it cannot be written: tokenizers raises a bare Exception."""
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error


def repair_generation_config(model: Any) -> list[str]:
    """Drop the generation options that transformers refuses to save, such as a temperature with do_sample=false.

    Published models contain them, and they have no effect. Returns a note if there were any.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    if _saves(own):
        return []
    options = {name: value for name, value in own.to_diff_dict().items() if name != "transformers_version"}
    kept: dict[str, Any] = {}
    # the options that decide which others apply come first
    for name in sorted(options, key=lambda name: (name not in ("do_sample", "num_beams"), name)):
        if _saves(GenerationConfig(**kept, **{name: options[name]})):
            kept[name] = options[name]
    model.generation_config = GenerationConfig(**kept)
    dropped = ", ".join(f"{name}={options[name]}" for name in options if name not in kept)
    return [f"generation_config.json: {dropped} dropped, which the model's other options contradict"]


def _saves(settings: Any) -> bool:
    try:
        with quietly():
            settings.validate(strict=True)
    except ValueError:
        return False
    return True


def _gather(engine: Engine) -> dict[str, torch.Tensor]:
    """The tensors to save by name, on rank 0's host, gathered one parameter at a time under ZeRO-3.

    A method with a frozen base saves only what it trains, and the buffers of modules that it trains whole.
    """
    trained_only = engine.config.method.frozen_base
    model, main = engine.objective.model, engine.world.is_main
    weights = {}
    for name, parameter in model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with _whole(engine, parameter):
            if main:
                weights[name] = parameter.detach().to("cpu", copy=True)
    if main:
        buffers = saved_buffers(model, trained_only=trained_only)
        weights |= {name: buffer.detach().to("cpu", copy=True) for name, buffer in buffers}
    return weights


def saved_buffers(model: torch.nn.Module, *, trained_only: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that `final/` holds, by name; `trained_only`: those of modules that train whole.

    Commits hold no buffers: the self-check refuses a model that changes one in training.
    """
    for name, buffer in persistent_buffers(model):
        if not trained_only or ".modules_to_save." in name:
            yield name, buffer


def _whole(engine: Engine, parameter: torch.nn.Parameter) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=None, enabled=engine.stage == 3)


def _as_written(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` under the names and in the layout of the files: one tensor per expert, without an adapter's name."""
    from transformers.core_model_loading import revert_weight_conversion

    if hasattr(model, "peft_config"):
        import peft

        return dict(peft.get_peft_model_state_dict(model, state_dict=weights))
    unsaved = model._keys_to_ignore_on_save or ()
    return dict(revert_weight_conversion(model, {name: w for name, w in weights.items() if name not in unsaved}))


def _explain(error: Exception, folder: Path, advice: str) -> UserError | TrainingError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, OSError | SafetensorError):
        reason = (error.strerror if isinstance(error, OSError) else None) or lines[0]
        return StorageError(f"{folder}: cannot be written ({reason}). {advice}")
    reason = str(error) if isinstance(error, TrainingError) else f"{type(error).__name__}: {lines[0]}"
    return TrainingError(f"{folder}: not written, because of a failed check or an error ({reason}). {advice}")


def _name_base_model(folder: Path, base: str) -> None:
    """If the base is a hub id, name it in the adapter's config as such, not by this machine's cache folder."""
    path = folder / "adapter_config.json"
    if not path.exists():
        return
    settings = json.loads(path.read_text())
    if not Path(settings["base_model_name_or_path"]).is_dir():
        settings["base_model_name_or_path"] = base
        path.write_text(json.dumps(settings, indent=2, sort_keys=True))
