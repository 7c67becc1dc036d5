"""Writes the result of a run as a folder that plain transformers (full) or peft (LoRA) loads.

The folder is written under a temporary name and renamed, so `final/` is never incomplete.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ft_dist.distributed import barrier
from ft_dist.engine.step import Engine
from ft_dist.model.quiet import quietly


def write_final(engine: Engine, tokenizer: Any, folder: Path) -> None:
    """All ranks call it; rank 0 writes the adapter or the whole model, and the tokenizer."""
    weights = _gather(engine)
    if engine.world.is_main:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_model(engine.objective.model, weights, tokenizer, partial, base=engine.config.model.path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    barrier(engine.world)


def write_model(model: Any, weights: dict[str, torch.Tensor], tokenizer: Any, folder: Path, *, base: str) -> None:
    """Write `weights` of the transformers or peft `model` in the form of `final/`. `base` is `model.path`."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    with quietly():
        # training runs without a key-value cache, but generation from the result uses one
        causal_lm.config.use_cache = True
        model.save_pretrained(str(folder), state_dict=weights)
        causal_lm.config.use_cache = False
        tokenizer.save_pretrained(str(folder))
    _name_base_model(folder, base)


def _gather(engine: Engine) -> dict[str, torch.Tensor]:
    """The weights to save by name, on rank 0's host, gathered one parameter at a time under ZeRO-3.

    A method with a frozen base saves only what it trains.
    """
    trained_only = engine.config.method.frozen_base
    weights = {}
    for name, parameter in engine.objective.model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with _whole(engine, parameter):
            if engine.world.is_main:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def _whole(engine: Engine, parameter: torch.nn.Parameter) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=None, enabled=engine.stage == 3)


def _name_base_model(folder: Path, base: str) -> None:
    """If the base is a hub id, name it in the adapter's config as such, not by this machine's cache folder."""
    path = folder / "adapter_config.json"
    if not path.exists():
        return
    settings = json.loads(path.read_text())
    if not Path(settings["base_model_name_or_path"]).is_dir():
        settings["base_model_name_or_path"] = base
        path.write_text(json.dumps(settings, indent=2, sort_keys=True))
