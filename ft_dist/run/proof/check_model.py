"""What `ft-dist check` finds out about the model with the code that loads, adapts and checks it in a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ft_dist.config import RunConfig
from ft_dist.distributed import join_world, leave_world
from ft_dist.engine.build import build_engine
from ft_dist.model.builtin import local_folder, resolve_model
from ft_dist.model.load import enable_activation_checkpointing, load_model, outline
from ft_dist.model.parts.layers import layers_of
from ft_dist.model.quiet import quietly
from ft_dist.model.tokenizer import configured_tokenizer, new_token_ids
from ft_dist.network.open import open_store
from ft_dist.plan.gpu import device_here
from ft_dist.run.out_of_memory import is_out_of_memory
from ft_dist.run.proof.self_check import self_check

AT_START = "a run checks loss, isolation and gradients itself when it starts"


def check_model(config: RunConfig, *, weights: bool, say: Callable[[str], None] = print) -> list[str]:
    """Compare the weights' names and shapes with the model's, and adapt it; returns lines for the console.

    Weights that only the hub has are not downloaded, unless `weights`: then they are also loaded, in this process and
    without an optimizer, and the model's loss, isolation and gradients are checked. Raises ModelError as a run would.
    """
    place = resolve_model(config.model.path)
    folder = local_folder(place, config.model.revision)
    tokenizer, _ = configured_tokenizer(config.model, place)
    left_out: list[str] = []
    causal_lm: nn.Module
    if Path(folder).is_dir():
        causal_lm, left_out = load_model(config.model, folder=folder, vocabulary=len(tokenizer), meta=True)
    else:
        causal_lm = outline(config.model, folder=place)
    if config.engine.activation_checkpointing:
        enable_activation_checkpointing(causal_lm)
    size = sum(parameter.nbytes for parameter in causal_lm.parameters())
    layers = layers_of(causal_lm)
    with quietly(), torch.device("meta"):
        config.method.adapt(causal_lm, layers, new_token_ids=new_token_ids(config.model, tokenizer))
    if not weights:
        return left_out
    if too_large := _too_large(size):
        return [*left_out, too_large]
    if not Path(folder).is_dir():
        say(f"{place}: downloading {size / 2**30:.1f} GiB of weights from the hub")
    return list(dict.fromkeys([*left_out, *_check_weights(config, place, tokenizer)]))


def _too_large(size: int) -> str | None:
    """Why weights of `size` bytes are not loaded, or None."""
    device = device_here(1)
    if device is None or size < device.memory:
        return None
    return (
        f"model: not loaded by --model: its weights take {size / 2**30:.1f} GiB, and {device.name} has "
        f"{device.memory / 2**30:.1f} GiB; {AT_START}"
    )


def _check_weights(config: RunConfig, place: str, tokenizer: Any) -> list[str]:
    """A run may have many ranks for what runs out of memory here, so that is no error."""
    world = join_world(open_store(timeout_s=config.engine.timeout_s), timeout_s=config.engine.timeout_s)
    try:
        engine = build_engine(config, world, folder=place, tokenizer=tokenizer, trains=False)
        folder = local_folder(place, config.model.revision)
        checked = self_check(engine, config, folder=folder, tokenizer=tokenizer, samples=None)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        return [f"model: not checked by --model: out of memory in one process ({reason[:200]}); {AT_START}"]
    finally:
        leave_world()
    return [*engine.notes, engine.kernels, *checked.lines]
