"""What the flat tensors hold that ZeRO hands to an optimizer: pieces of parameters, one after another."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + numel) of the flattened parameter `name`, of `shape`, at `offset` of the tensor `flat`.

    `owned`: this rank saves it; only where ranks keep replicas is that not so.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: torch.Tensor
    offset: int
    owned: bool = True

    def of(self, state: torch.Tensor) -> torch.Tensor:
        """The view (numel,) of a tensor that has one entry an element of `flat`."""
        return state.view(-1).narrow(0, self.offset, self.numel)


Segments = dict[torch.Tensor, list[Segment]]
"""By flat tensor, in the optimizer's order, which is the same on every rank; a rank may hold no piece of a parameter"""
