"""Contents of the flat tensors that ZeRO passes to an optimizer: pieces of parameters in sequence."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + numel) of the flattened parameter `name`, of `shape`, at `offset` of the tensor `flat`.

    `owned`: this rank saves it, which is false only for replicas.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: torch.Tensor
    offset: int
    owned: bool = True

    def of(self, state: torch.Tensor) -> torch.Tensor:
        """The view (numel,) of a tensor with one entry per element of `flat`."""
        return state.view(-1).narrow(0, self.offset, self.numel)


Segments = dict[torch.Tensor, list[Segment]]
"""By flat tensor, in the optimizer's order, which is the same on every rank; a rank may hold no piece of a parameter"""


class PartitionedOptimizer(torch.optim.Optimizer, ABC):
    """Steps flat fp32 tensors according to their contents, which `hold` sets before the first real step."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, {"lr": 0.0, **defaults})
        self.segments: Segments = {}

    def hold(self, segments: Segments) -> None:
        self.segments = segments

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is None or flat not in self.segments:
                    continue
                state = self.moments(flat, group)
                state["step"] += 1
                self.update(flat, state, group)

    def moments(self, flat: torch.Tensor, group: dict[str, Any]) -> dict[Any, Any]:
        """The state of `flat`: `step` and the result of `new_moments`."""
        state: dict[Any, Any] = self.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the host, which reads it in every step
            state.update(self.new_moments(flat, group))
        return state

    @abstractmethod
    def new_moments(self, flat: torch.Tensor, group: dict[str, Any]) -> dict[Any, Any]:
        """Initial moments of a tensor."""

    @abstractmethod
    def update(self, flat: torch.Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        """One step of `flat`; `state["step"]` already includes it."""
