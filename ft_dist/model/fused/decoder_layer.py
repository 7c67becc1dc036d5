"""The forward pass of a decoder layer, with the residual additions inside its norms.

    y, x = norm1(x)                  x is also an output, so norm1's backward adds the gradient of its other use
    y, x = norm2(attention(y), x)    the norm of the sum x + attention(y), and the sum itself
    x    = x + mlp(y)

Gemma 2 and 3 normalise the outputs of attention and MLP before they add them. Layers pass one tensor on, as in
transformers, so hooks, activation checkpointing and recorded hidden states see no difference.

Shapes: hidden states (B, S, H).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ft_dist.model.families import Family
from ft_dist.model.fused.merged import Merged
from ft_dist.model.shape import BLOCK_NORMS


def layer_forward(layer: Any, groups: Mapping[nn.Module, Merged], *, sandwich: bool) -> Any:
    """A replacement for a layer's `forward`; its norms already have theirs from `forward.py`.

    `groups` maps attention and MLP, if their forward is replaced too, to the layers that read their input: the norm's
    output gets the spare columns that these need.
    """
    before_mlp = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm

    def body(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        room = _room(groups.get(layer.self_attn), hidden_states)
        normed, residual = layer.input_layernorm(hidden_states, with_sum=True, **room)
        attended, _ = layer.self_attn(hidden_states=normed, **room, **kwargs)
        if sandwich:
            attended = layer.post_attention_layernorm(attended)
        attended = _dropped(layer, "resid_attn_dropout", attended)
        room = _room(groups.get(layer.mlp), hidden_states)
        normed, residual = before_mlp(attended, residual, **room)
        output = layer.mlp(normed, **room)
        if sandwich:
            output = layer.post_feedforward_layernorm(output)
        return residual + _dropped(layer, "resid_mlp_dropout", output)

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if _checkpoints_in_forward(layer) and layer.gradient_checkpointing and layer.training:
            # the class checkpoints inside the forward that this one replaces
            kwargs |= {name: None for name in ("use_cache", "past_key_values") if name in kwargs}
            output: torch.Tensor = layer._gradient_checkpointing_func(partial(body, **kwargs), hidden_states)
            return output
        return body(hidden_states, **kwargs)

    return forward


def is_decoder_layer(module: nn.Module, family: Family) -> bool:
    """Whether the module has exactly the parts that `layer_forward` runs."""
    children = {name for name, _ in module.named_children()}
    dropouts = {"resid_attn_dropout", "resid_mlp_dropout"}
    return children - dropouts == {"self_attn", "mlp", *layer_norms(family)}


def layer_norms(family: Family) -> tuple[str, ...]:
    return BLOCK_NORMS[: family.block_norms]


def _room(group: Merged | None, hidden_states: torch.Tensor) -> dict[str, int]:
    spare = 0 if group is None else group.spare(hidden_states)
    return {"spare": spare} if spare else {}


def _dropped(layer: Any, name: str, output: torch.Tensor) -> torch.Tensor:
    """Phi-3's dropout of the outputs of attention and MLP."""
    dropout = getattr(layer, name, None)
    return dropout(output) if dropout is not None and dropout.p else output


def _checkpoints_in_forward(layer: nn.Module) -> bool:
    """Newer transformers (5.23) recompute inside a layer's `forward`, older ones (5.17) around it in `__call__`."""
    return type(layer).__call__ is nn.Module.__call__
