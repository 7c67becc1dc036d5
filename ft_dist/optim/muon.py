"""Muon: a matrix's momentum is orthogonalised before it is applied; everything else uses AdamW.

    m = momentum m + (1 - momentum) g        u = momentum m + (1 - momentum) g   (Nesterov)
    W -= lr 0.2 sqrt(max(rows, columns)) U V^T,  where u = U S V^T,  by five Newton-Schulz steps

The factor gives an update the root mean square of AdamW's, so one learning rate and weight decay fit both.

ZeRO splits matrices between ranks, and half a matrix orthogonalises differently: a matrix split over several ranks is
gathered on one of them, in turn, and its update is sent back. The result equals that of one rank at any stage.

Sources: Jordan (https://kellerjordan.github.io/posts/muon/); the factor, Liu et al. (arXiv 2502.16982).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from ft_dist.optim.partition import PartitionedOptimizer, Segments

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
RMS_OF_ADAMW = 0.2


@dataclass
class Matrix:
    """A parameter of `shape` and how many of its elements each rank holds; ranks ascend with the elements."""

    shape: tuple[int, ...]
    sizes: dict[int, int] = field(default_factory=dict)

    @property
    def is_split(self) -> bool:
        return max(self.sizes.values()) < math.prod(self.shape)


class Muon(PartitionedOptimizer):
    """Groups with `orthogonal` use Muon, the others AdamW.

    With several ranks, every rank must step the same tensors in the same order.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, momentum: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._matrices: dict[Tensor, dict[str, Matrix]] = {}

    def hold(self, segments: Segments) -> None:
        """Exchange which part of each parameter every rank holds. All ranks call it together."""
        super().hold(segments)
        mine = [[(segment.name, segment.shape, segment.numel) for segment in held] for held in segments.values()]
        everyone: list[Any] = [mine]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        for index, flat in enumerate(segments):
            matrices = self._matrices[flat] = {}
            for rank, flats in enumerate(everyone):
                for name, shape, numel in flats[index]:
                    matrices.setdefault(name, Matrix(shape)).sizes[rank] = numel

    def new_moments(self, flat: Tensor, group: dict[str, Any]) -> dict[Any, Any]:
        names = ("momentum_buffer",) if group["orthogonal"] else ("exp_avg", "exp_avg_sq")
        return {name: torch.zeros_like(flat, memory_format=torch.preserve_format) for name in names}

    def update(self, flat: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        (self._muon if group["orthogonal"] else self._adamw)(flat, state, group)

    def _adamw(self, flat: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            [flat],
            [flat.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [flat.new_full((), float(state["step"]) - 1)],  # the kernel adds 1
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, flat: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        gradient = flat.grad.reshape(-1)
        momentum = state["momentum_buffer"].view(-1).lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])
        held = {segment.name: segment for segment in self.segments[flat]}
        matrices = self._matrices[flat]
        for name, segment in held.items():
            if not matrices[name].is_split:
                piece = segment.of(update)
                piece.copy_(orthogonal(piece.view(segment.shape)).view(-1))
        split = {name: matrix for name, matrix in matrices.items() if matrix.is_split}
        _share(split, {name: segment.of(update) for name, segment in held.items()}, update[:0])
        flat.data.mul_(1 - group["lr"] * group["weight_decay"])
        for segment in held.values():
            factor = RMS_OF_ADAMW * max(segment.shape) ** 0.5
            segment.of(flat.data).sub_(segment.of(update), alpha=group["lr"] * factor)


def _share(split: dict[str, Matrix], pieces: dict[str, Tensor], nothing: Tensor) -> None:
    """Replace `pieces` of matrices split over ranks: of every `world size` matrices each rank computes one."""
    if not split:
        return
    world, rank = dist.get_world_size(), dist.get_rank()
    names = list(split)
    for first in range(0, len(names), world):
        turn = names[first : first + world]
        mine = split[turn[rank]] if rank < len(turn) else Matrix(())
        sent = [pieces.get(name, nothing) for name in turn] + [nothing] * (world - len(turn))
        received = [nothing.new_empty(mine.sizes.get(other, 0)) for other in range(world)]
        _exchange(sent, received)
        if mine.sizes:
            whole = orthogonal(torch.cat(received).view(mine.shape)).reshape(-1)
            received = list(whole.split([len(piece) for piece in received]))
        _exchange(received, sent)


def _exchange(sent: list[Tensor], received: list[Tensor]) -> None:
    """sent[r] goes to rank r and received[r] is filled with what it sent."""
    buffer = torch.cat(received)
    sizes = [len(piece) for piece in received]
    dist.all_to_all_single(buffer, torch.cat(sent), sizes, [len(piece) for piece in sent])
    for piece, values in zip(received, buffer.split(sizes), strict=True):
        piece.copy_(values)


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix: singular values between about 0.7 and 1.2. fp32 in and out.

    Computed in bf16 on GPUs, for which the coefficients were chosen.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    x = x / (x.norm() + 1e-7)
    for _ in range(ROUNDS):
        square = x @ x.T
        x = a * x + torch.addmm(square, square, square, beta=b, alpha=c) @ x
    return (x.T if tall else x).float()
