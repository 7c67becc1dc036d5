"""Next-token prediction: cross-entropy summed over labelled tokens, divided by their count in the global batch."""

from typing import Any

import torch

from ft_dist.objective.protocol import Objective, Units


class CausalObjective(Objective):
    """The sum of -log p(label) over labelled tokens, fp32."""

    @staticmethod
    def weight(units: Units) -> int:
        return units.labelled_tokens

    def forward(self, *tensors: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Takes what `Objective.hidden` does."""
        loss: torch.Tensor = self.head(*self.hidden(*tensors, **inputs))
        return loss
