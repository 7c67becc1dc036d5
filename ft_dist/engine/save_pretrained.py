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
        model = engine.objective.model
        with quietly():
            # training runs without a key-value cache, but generation from the result uses one
            engine.objective.causal_lm.config.use_cache = True
            model.save_pretrained(str(partial), state_dict=weights)
            engine.objective.causal_lm.config.use_cache = False
            tokenizer.save_pretrained(str(partial))
        _name_base_model(partial, engine)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    barrier(engine.world)


def _gather(engine: Engine) -> dict[str, torch.Tensor]:
    """The weights to save by name, on rank 0's host, gathered one parameter at a time under ZeRO-3.

    A method with a frozen base saves only what it trains, and the buffers beside it.
    """
    trained_only = engine.config.method.frozen_base
    weights = {}
    for name, parameter in engine.objective.model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with _whole(engine, parameter):
            if engine.world.is_main:
                weights[name] = parameter.detach().to("cpu", copy=True)
    for name, buffer in engine.objective.model.named_buffers():
        if ".modules_to_save." in name:
            weights[name] = buffer.detach().to("cpu", copy=True)
    return weights


def _whole(engine: Engine, parameter: torch.nn.Parameter) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=None, enabled=engine.stage == 3)


def _name_base_model(folder: Path, engine: Engine) -> None:
    """If the base is a hub id, name it in the adapter's config as such, not by this machine's cache folder."""
    path = folder / "adapter_config.json"
    if not path.exists():
        return
    settings = json.loads(path.read_text())
    if not Path(settings["base_model_name_or_path"]).is_dir():
        settings["base_model_name_or_path"] = engine.config.model.path
        path.write_text(json.dumps(settings, indent=2, sort_keys=True))
