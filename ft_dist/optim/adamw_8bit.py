"""AdamW with 8-bit moments: 2 bytes per element instead of 8.

A moment is split into blocks of 256 elements; a block stores its largest magnitude and, per element, the index of the
nearest of 255 values. These are dense near zero (dynamic tree quantisation): seven decades, each with half as many
values as the one above. The update is computed in fp32 before the moments are rounded again. A non-zero second moment
never becomes zero, which would divide by eps alone.

Both ends of the range are among the values, so re-quantising a stored moment gives the same 8 bits: a checkpoint holds
plain fp32 moments, from which another world size, or AdamW in 32 bits, can resume.

Source: Dettmers et al. (arXiv 2110.02861).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ft_dist.optim.partition import PartitionedOptimizer, Segment

BLOCK = 256
PIECE_ELEMENTS = 1 << 24
"""Elements widened to fp32 at a time"""


class AdamW8bit(PartitionedOptimizer):
    """AdamW (arXiv 1711.05101) over flat fp32 tensors; its state has one Moment per (name, offset)."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": 0.0})

    def new_moments(self, flat: Tensor, group: dict[str, Any]) -> dict[Any, Any]:
        return {
            (key, segment.offset): Moment(segment.numel, signed=signed, device=flat.device)
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False))
            for segment in self.segments[flat]
        }

    def update(self, flat: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        assert flat.grad is not None
        for segment in self.segments[flat]:
            self._update(segment, flat.grad, state, group)

    def _update(self, segment: Segment, gradients: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        step = float(state["step"])
        weights, gradients = segment.of(segment.flat.data), segment.of(gradients)
        first, second = state["exp_avg", segment.offset], state["exp_avg_sq", segment.offset]
        for at in range(0, segment.numel, PIECE_ELEMENTS):
            end = min(at + PIECE_ELEMENTS, segment.numel)
            gradient, weight = gradients[at:end], weights[at:end]
            m = first.read(at, end).lerp_(gradient, 1 - beta1)
            v = second.read(at, end).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))
            first.write(m, at)
            second.write(v, at)


class Moment:
    """`numel` fp32 values stored as 8-bit indices and one fp32 scale per block."""

    def __init__(self, numel: int, *, signed: bool, device: torch.device) -> None:
        self.numel, self.signed = numel, signed
        blocks = -(-numel // BLOCK)
        self.codes = torch.full((blocks, BLOCK), _zero(signed), dtype=torch.uint8, device=device)
        self.scales = torch.zeros(blocks, 1, dtype=torch.float32, device=device)

    dtype = torch.float32

    @property
    def shape(self) -> tuple[int]:
        return (self.numel,)

    @property
    def nbytes(self) -> int:
        return 4 * self.numel

    def element_size(self) -> int:
        return 4

    def detach(self) -> Tensor:
        """All values in fp32, for snapshots."""
        return self.read()

    def read(self, start: int = 0, end: int | None = None) -> Tensor:
        """Values start .. end - 1, fp32; start is a multiple of BLOCK."""
        end = self.numel if end is None else end
        blocks = slice(start // BLOCK, -(-end // BLOCK))
        values = _values(self.signed, self.codes.device)[self.codes[blocks].int()]
        return values.mul_(self.scales[blocks]).view(-1)[: end - start]

    def write(self, values: Tensor, start: int = 0) -> None:
        """Store values (n,) from `start`, a multiple of BLOCK; n fills whole blocks or ends with the last."""
        count = -(-len(values) // BLOCK)
        padded = torch.zeros(count * BLOCK, dtype=torch.float32, device=self.codes.device)
        padded[: len(values)] = values
        padded = padded.view(count, BLOCK)
        scales = padded.abs().amax(1, keepdim=True)
        blocks = slice(start // BLOCK, start // BLOCK + count)
        self.scales[blocks] = scales
        shares = padded / scales.clamp_min(torch.finfo(torch.float32).tiny)
        codes = torch.bucketize(shares, _borders(self.signed, shares.device))
        if not self.signed:
            codes.clamp_min_((padded > 0).to(codes.dtype))
        self.codes[blocks] = codes.to(torch.uint8)


CPU = torch.device("cpu")


@cache
def _values(signed: bool, device: torch.device = CPU) -> Tensor:
    """The 255 (signed) or 256 values, ascending from -1 or 0 to 1. Cached per device, because a copy would stall a
    GPU."""
    if device != CPU:
        return _values(signed).to(device)
    bits = 7 if signed else 8
    decades = []
    for zeros in range(bits):
        edges = torch.linspace(0.1, 1, 2 ** (bits - 1 - zeros) + 1, dtype=torch.float64)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0**-zeros)
    positive = torch.cat(decades).sort().values
    positive[-1] = 1.0
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([-positive.flip(0), zero, positive] if signed else [zero, positive]).float()


@cache
def _borders(signed: bool, device: torch.device = CPU) -> Tensor:
    values = _values(signed).double()
    return ((values[:-1] + values[1:]) / 2).float().to(device)


def _zero(signed: bool) -> int:
    return int(_values(signed).eq(0).nonzero())
