"""The rows of new tokens in embedding and head, which train while the rest of both is frozen.

peft keeps them in a small matrix of their own. Its forward writes them into a copy of the whole matrix in
every step, and gives that copy a gradient; ours replaces the tokens' own outputs instead, and adds a head's bias, which
peft's leaves out. V: vocabulary, H: hidden size, N: new tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class TokenRows(NamedTuple):
    """Rows `ids` (N,) int64, ascending, of a matrix, and the trained `values` (N, H) in their place."""

    ids: torch.Tensor
    values: torch.Tensor


def run_token_rows(causal_lm: Any, register: Callable[[nn.Module, list[nn.Parameter]], None] | None = None) -> None:
    """Replace the forward of each layer with trained rows; `register` has ZeRO-3 gather the parameters it reads."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for layer in [module for module in causal_lm.modules() if isinstance(module, TrainableTokensLayer)]:
        if register is not None:
            register(layer, list(layer.parameters()))
        [adapter] = layer.token_indices
        ids_N = torch.tensor(layer.token_indices[adapter], device=layer.get_base_layer().weight.device)
        layer.register_buffer("token_ids", ids_N, persistent=False)
        layer.forward = _forward(layer)  # on the instance only


def token_rows(layer: Any) -> TokenRows | None:
    """The trained rows of such a layer; None while its base runs alone (disabled or merged)."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    return TokenRows(layer.token_ids, layer.trainable_tokens_delta[layer.active_adapters[0]])


def _forward(layer: Any) -> Callable[..., torch.Tensor]:
    original, base = layer.forward, layer.get_base_layer()

    def embed(ids: torch.Tensor) -> torch.Tensor:
        rows = token_rows(layer)
        output: torch.Tensor = base(ids)
        if rows is None:
            return output
        place = torch.searchsorted(rows.ids, ids).clamp_(max=len(rows.ids) - 1)
        values = F.embedding(place, rows.values).to(output.dtype)
        scale = getattr(base, "embed_scale", None)  # embeddings are multiplied by it: a tensor in Gemma, else a number
        if scale is not None:
            values = values * (scale.to(values.dtype) if isinstance(scale, torch.Tensor) else scale)
        return torch.where((rows.ids[place] == ids)[..., None], values, output)

    def project(x: torch.Tensor) -> torch.Tensor:
        rows = token_rows(layer)
        output: torch.Tensor = base(x)
        if rows is None:
            return output
        bias = None if base.bias is None else base.bias[rows.ids]
        return output.index_copy_(-1, rows.ids, F.linear(x, rows.values.to(x.dtype), bias))

    if isinstance(base, nn.Embedding):
        return embed
    return project if isinstance(base, nn.Linear) else original
