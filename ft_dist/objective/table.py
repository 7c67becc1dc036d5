"""The objectives by name."""

from typing import Any

from torch import nn

from ft_dist.objective.causal import CausalObjective
from ft_dist.objective.protocol import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "causal": CausalObjective,
}
DEFAULT = "causal"


def build_objective(model: nn.Module, *, name: str = DEFAULT, **options: Any) -> Objective:
    """The objective called `name` around `model`; `options` are those of `Objective`."""
    return OBJECTIVES[name](model, **options)
