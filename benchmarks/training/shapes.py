"""A bare model of a published shape with random weights, since speed does not depend on the values."""

from typing import Any

import torch

from ft_dist.bench.shapes import SHAPES

POSITIONS = 8192


def build(name: str, *, dtype: torch.dtype, device: str, layers: int | None = None) -> Any:
    """In training mode, with the same weights on every call; `layers` overrides the shape's number of layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {key: value for key, value in SHAPES[name].items() if key != "architectures"}
    if layers:
        shape["num_hidden_layers"] = layers
    config = AutoConfig.for_model(**shape, max_position_embeddings=POSITIONS, use_cache=False)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()
