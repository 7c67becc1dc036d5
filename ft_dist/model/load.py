"""Load a pretrained causal language model for training and resize its embeddings.

Under ZeRO-3 every weight is partitioned as it is read, so that no rank ever holds the whole model.
"""

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ft_dist.config.schema import ModelConfig
from ft_dist.errors import ModelError
from ft_dist.model.anatomy.weights import check_loaded, is_of_folder, reason_of
from ft_dist.model.facts import adapter_inside, count_tensors
from ft_dist.model.quiet import quietly

MOST_MODULES, MODULES_PER_TENSOR = 10_000, 20
"""A model of N tensors has at most A + B x N modules. The largest experts that are modules of their own make up
117,000, with 88,000 tensors"""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Loaded(NamedTuple):
    """A model, and lines for the user on what was not loaded."""

    model: nn.Module
    notes: list[str]


def load_model(
    model: ModelConfig,
    *,
    folder: str,
    vocabulary: int,
    zero3_settings: dict[str, Any] | None = None,
    meta: bool = False,
) -> Loaded:
    """The causal language model in `folder` (or hub id), in `model.dtype`, embeddings grown to `vocabulary` rows.

    `zero3_settings` is DeepSpeed's configuration when the weights are to be partitioned on load. `meta` reads only
    names and shapes, and makes a model without values. Raises ModelError, also if a weight would be random.
    """
    from transformers import AutoModelForCausalLM

    with _partitioned_on_load(zero3_settings):
        with _explained(model, alone=zero3_settings is None), _bounded(folder), quietly():
            causal_lm, found = AutoModelForCausalLM.from_pretrained(
                folder,
                revision=model.revision,
                dtype=DTYPES[model.dtype],
                attn_implementation=attention_implementation(model),
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,  # other files can hold code
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are listed
                **({"device_map": "meta"} if meta else {}),
            )
        if getattr(causal_lm, "_hf_peft_config_loaded", False):  # of a hub id; a folder is refused earlier
            raise ModelError(adapter_inside(model.path))
        notes = check_loaded(found, causal_lm, f"model.path={model.path}")
        if not meta:
            grow_embeddings(causal_lm, vocabulary)
    causal_lm.config.use_cache = False
    return Loaded(causal_lm, notes)


def outline(model: ModelConfig, *, folder: str) -> nn.Module:
    """The same model without values, on the meta device, from config.json alone: nothing reads or downloads weights.

    Raises ModelError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _explained(model), _bounded(folder), quietly(), torch.device("meta"):
        trusted = model.trust_remote_code
        config = AutoConfig.from_pretrained(folder, revision=model.revision, trust_remote_code=trusted)
        own_code = trusted and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        causal_lm: nn.Module = AutoModelForCausalLM.from_config(
            config,
            dtype=DTYPES[model.dtype],
            attn_implementation=attention_implementation(model),
            trust_remote_code=trusted,
            **({"code_revision": model.revision} if own_code else {}),
        )
    return causal_lm


def random_model(
    model: ModelConfig,
    *,
    folder: str,
    vocabulary: int,
    zero3_settings: dict[str, Any] | None = None,
) -> Loaded:
    """A model of the shape in `folder`'s config.json with random weights, as fast as the real one.

    Created on its final device, because a GPU draws billions of random numbers in seconds. Arguments as `load_model`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    place = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with _partitioned_on_load(zero3_settings), quietly(), place if zero3_settings is None else contextlib.nullcontext():
        causal_lm = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code),
            dtype=DTYPES[model.dtype],
            attn_implementation=attention_implementation(model),
        )
    causal_lm.config.use_cache = False
    return Loaded(causal_lm, [])


def attention_implementation(model: ModelConfig) -> str | None:
    """None lets transformers choose: SDPA for architectures that support it, eager otherwise."""
    if model.attention != "auto":
        return model.attention
    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash and model.dtype == "bf16" else None


def grow_embeddings(causal_lm: nn.Module, vocabulary: int) -> None:
    """Add rows for new tokens; never shrink, because models pad their vocabulary for speed."""
    embedding = causal_lm.get_input_embeddings()
    rows = getattr(embedding.weight, "ds_shape", embedding.weight.shape)[0]
    if vocabulary > rows:
        causal_lm.resize_token_embeddings(vocabulary, pad_to_multiple_of=64)


def enable_activation_checkpointing(causal_lm: nn.Module) -> None:
    """Recompute each block in the backward pass instead of keeping its activations. Raises ModelError."""
    if not causal_lm.supports_gradient_checkpointing:
        raise ModelError(
            f"engine.activation_checkpointing=true: {type(causal_lm).__name__} in transformers cannot recompute its "
            "blocks. Set engine.activation_checkpointing=false."
        )
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # checkpointed blocks only run under module.train()
    causal_lm.train()


@contextlib.contextmanager
def _explained(model: ModelConfig, *, alone: bool = True) -> Iterator[None]:
    """Turns what transformers raises inside into a ModelError. `alone`: the load waits for no other rank."""
    try:
        yield
    except Exception as error:  # a damaged or foreign folder makes transformers raise errors of any kind
        if not is_of_folder(error, alone=alone):
            raise
        raise ModelError(f"model.path={model.path}: transformers cannot load it ({reason_of(error)}).") from error


@contextlib.contextmanager
def _bounded(folder: str) -> Iterator[None]:
    """Refuse a config.json that asks for far more layers than the weights have, before they fill the memory."""
    tensors = count_tensors(Path(folder))
    most = MOST_MODULES + MODULES_PER_TENSOR * tensors if tensors else None
    count = itertools.count(1)

    def registered(module: nn.Module, name: str, child: nn.Module | None) -> None:
        if most is not None and next(count) > most:
            raise ValueError(f"config.json asks for more than {most:,} modules, but the weights are {tensors} tensors")

    handle = torch.nn.modules.module.register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _partitioned_on_load(settings: dict[str, Any] | None) -> Iterator[None]:
    """Make transformers build the model under `deepspeed.zero.Init` during the load."""
    if settings is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()
