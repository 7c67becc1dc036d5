"""Layers with adapters that read the same x, as one product over one weight where that is faster (`lora/extended.py`).

The frozen weights of such a group move into one buffer and the parameters become views of it, so nothing exists twice:
saving, merging an adapter and running with adapters disabled use the views. The weights move when the group first runs,
after DeepSpeed has broadcast the parameters (collectives need them contiguous), and again if something like `model.to`
has moved them since.
"""

from collections.abc import Sequence
from typing import Any

import torch
from ft_dist_kernels.backend import Backend
from ft_dist_kernels.lora.extended import ExtendedWeight, extended_spare, lora_linear_extended, suits_extended
from ft_dist_kernels.lora.op import LoraWeights
from torch import nn


def lora_weights(layer: Any) -> LoraWeights | None:
    """The kernel's arguments for a peft LoRA layer, or None while peft's own forward must run: adapters disabled,
    merged, or several active."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    base = layer.get_base_layer()
    dropout = layer.lora_dropout[name]
    dora = getattr(layer, "lora_magnitude_vector", {})
    return LoraWeights(
        weight=base.weight,
        bias=base.bias,
        lora_a=layer.lora_A[name].weight,
        lora_b=layer.lora_B[name].weight,
        scale=layer.scaling[name],
        dropout_p=dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0,
        dora_magnitude=dora[name].weight if name in dora else None,
    )


class Merged:
    """A group of layers that read the same x; they run as one product if all have adapters and `together` is set."""

    def __init__(self, layers: Sequence[Any], *, together: bool, backend: Backend) -> None:
        self.layers, self.backend = list(layers), backend
        self._may = together and all(hasattr(layer, "lora_A") for layer in layers)
        self._extended: ExtendedWeight | None = None

    def members(self) -> list[LoraWeights] | None:
        """None while peft's own forward must run for one of the layers."""
        found = [lora_weights(layer) for layer in self.layers]
        return None if None in found else [member for member in found if member is not None]

    def spare(self, like: torch.Tensor) -> int:
        """Columns that x, of the dtype and device of `like`, needs after each row for the group to run as one product;
        0 while the layers run separately."""
        if not self._may or torch.is_autocast_enabled(like.device.type):
            return 0
        members = self.members()
        if members is None or not suits_extended(members, dtype=like.dtype, device=like.device):
            return 0
        return extended_spare([member.lora_a.shape[0] for member in members])

    def __call__(self, x: torch.Tensor, spare: int) -> torch.Tensor:
        """Concatenated outputs (..., sum of out) for x (..., in), which was allocated with `spare` columns."""
        members = self.members()
        assert members is not None
        extended = self._extended
        if extended is None or extended.spare != spare or not extended.holds(members):
            extended = self._extended = self._extend(members)
            members = self.members()
            assert members is not None
        y_TO = lora_linear_extended(x.flatten(0, -2), extended, members, spare=spare, backend=self.backend)
        return y_TO.view(*x.shape[:-1], -1)

    def _extend(self, members: Sequence[LoraWeights]) -> ExtendedWeight:
        weights = [member.weight for member in members if isinstance(member.weight, torch.Tensor)]
        ranks = [member.lora_a.shape[0] for member in members]
        biases = [member.bias for member in members]
        extended = ExtendedWeight.extend(weights, biases, ranks, weights[0].dtype)
        for weight, bias, view, bias_view in zip(weights, biases, extended.views, extended.bias_views, strict=True):
            weight.data = view
            if bias is not None and bias_view is not None:
                bias.data = bias_view
        return extended
