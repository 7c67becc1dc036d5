"""The decoder inside a causal language model, and the masks that keep samples of a packed row apart in it."""

from typing import Any

import torch
from torch import nn

from ft_dist.errors import ModelError


def decoder_of(causal_lm: Any) -> nn.Module:
    """The module that turns tokens into the hidden states that the output head reads. Raises ModelError."""
    head = causal_lm.get_output_embeddings()
    # some classes return themselves, or have a head called `decoder`
    candidates = [causal_lm.get_decoder(), getattr(causal_lm, causal_lm.base_model_prefix, None)]
    candidates += [child for child in causal_lm.children() if len(list(child.children())) > 1]
    for module in candidates:
        if isinstance(module, nn.Module) and module is not causal_lm and module is not head:
            return module
    raise ModelError(
        f"model.path: {type(causal_lm).__name__} has no decoder separate from its output head, so its loss cannot be "
        "computed in chunks. Use a model of another architecture."
    )


def other_parameters(causal_lm: Any) -> list[nn.Parameter]:
    """Those of a multimodal model that are not its text model's. They are frozen with every method."""
    if causal_lm.config.get_text_config() is causal_lm.config:
        return []
    text = [decoder_of(causal_lm), causal_lm.get_output_embeddings()]
    of_text = {id(parameter) for module in text if module is not None for parameter in module.parameters()}
    return [parameter for parameter in causal_lm.parameters() if id(parameter) not in of_text]


def block_masks(causal_lm: Any, position_ids: torch.Tensor) -> Any:
    """Attention masks that separate samples, for models that build theirs without `position_ids`.

    position_ids: (R, T) int64, restarting at every sample. Returns what the model's `generate` passes as
    `attention_mask`: a mask, or masks by layer type, in the form of its attention backend; None if its layers have
    other types.
    """
    from transformers.masking_utils import create_masks_for_generate

    like = torch.empty(*position_ids.shape, 1, dtype=causal_lm.dtype, device=position_ids.device)
    return create_masks_for_generate(
        config=causal_lm.config,
        inputs_embeds=like,
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids,
    )
