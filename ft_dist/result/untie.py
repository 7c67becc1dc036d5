"""Prepares a tied output head for merging: peft merges layer by layer, into a matrix that embedding and head share."""

from typing import Any

from torch import nn


def untie_where_adapted(adapted: Any) -> None:
    """Give the head a matrix of its own if the adapter changes embedding and head differently.

    Rows of new tokens beneath an adapter on the head go into that matrix first: peft would merge the adapter into a
    temporary copy and lose it.
    """
    causal_lm = adapted.get_base_model()
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if head is None:
        return
    own_head, own_embedding = frozen_layer(head), frozen_layer(embedding)
    parted = any(hasattr(end, "lora_A") or hasattr(end, "modules_to_save") for end in (embedding, head))
    if parted and own_head.weight is own_embedding.weight:
        own_head.weight = nn.Parameter(own_embedding.weight.detach().clone())
        for config in (causal_lm.config, causal_lm.config.get_text_config()):
            config.tie_word_embeddings = False
    rows = getattr(getattr(head, "base_layer", None), "token_adapter", None)
    if rows is not None:
        rows.merge(safe_merge=True)
        head.base_layer = own_head


def frozen_layer(layer: Any) -> Any:
    """The layer of the base model inside peft's wrappers."""
    for name in ("original_module", "base_layer"):
        inner = getattr(layer, name, None)
        if isinstance(inner, nn.Module):
            return frozen_layer(inner)
    return layer
