"""The bf16 update at ZeRO stage 1, in about 20 operations for any number of tensors.

DeepSpeed's BF16_Optimizer keeps each parameter group in flat tensors: bf16 weights, fp32 gradient sums, and this rank's
share of the fp32 master weights. Its update visits every parameter and synchronises with the GPU twice. This one works
on the flat tensors, and the host reads nothing before the update is queued: the kernel of torch's fused AdamW divides
gradients by `grad_scale`, and changes nothing if `found_inf` says that the norm is not finite.

    g = sum over ranks of gradients        n = ||g||        g' = g / max(1, (n + 1e-6) / max_grad_norm)
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ft_dist.distributed import World, gather, reduce_scatter
from ft_dist.engine.settings import PIECE_ELEMENTS, WHOLE_GRADIENT_ELEMENTS
from ft_dist.optim.partition import PartitionedOptimizer

CPU_NORM_ELEMENTS = 1 << 16
"""torch's CPU norm uses eight fp32 accumulators: over 135 million elements the result was 1.4 % too small"""
GPU_NORM_ELEMENTS = 1 << 30
"""torch's norm of many tensors used 32-bit indices before 2.9 and read out of bounds from 2^31 elements on"""
CLIP_EPS = 1e-6
"""As in torch.nn.utils.clip_grad_norm_"""


class FlatUpdate:
    """Call `add_gradients` after every backward and `step` once per step.

    Gradients are summed over ranks, not averaged: losses must already be divided by the weight of the global batch.
    """

    def __init__(self, optimizer: Any, world: World, *, max_grad_norm: float) -> None:
        """`optimizer` is DeepSpeed's BF16_Optimizer; a `max_grad_norm` of 0 does not clip."""
        self._optimizer = optimizer
        self._world = world
        self._max_grad_norm = max_grad_norm
        # it then leaves gradients to hooks registered in its constructor, of which there are none
        optimizer.immediate_grad_update = True
        self._sums: list[Tensor] = optimizer.fp32_groups_gradients_flat
        self._shares: list[Tensor] = optimizer.fp32_groups_gradient_flat_partition
        for master, share in zip(optimizer.fp32_groups_flat_partition, self._shares, strict=True):
            master.grad = share
        device = world.device
        length = CPU_NORM_ELEMENTS if device.type == "cpu" else GPU_NORM_ELEMENTS
        self._normed = [piece for share in self._shares for piece in share.split(length)]
        self._clip_eps = torch.tensor(CLIP_EPS / (max_grad_norm or 1.0), dtype=torch.float64, device=device)
        self._pieces: list[tuple[list[Parameter], Tensor]] = []
        if sum(total.numel() for total in self._sums) <= WHOLE_GRADIENT_ELEMENTS:
            self._pieces = [
                piece
                for group, total in zip(optimizer.bf16_groups, self._sums, strict=True)
                for piece in _pieces(group, total)
            ]
        else:
            self._add_each_immediately()

    def add_gradients(self) -> None:
        """Add the parameters' gradients to the sums and free them. A parameter without a gradient adds nothing."""
        for parameters, total in self._pieces:
            gradients = [
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters
            ]
            total.add_(self._optimizer.flatten(gradients))
            for parameter in parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self, loss_sum: Tensor) -> tuple[float, float]:
        """Update the weights and reset the gradient sums. All ranks must call it.

        `loss_sum` is this rank's scalar (fp64). Returns its sum over ranks and the norm before clipping; if the norm is
        not finite, nothing was updated.
        """
        for total, share in zip(self._sums, self._shares, strict=True):
            reduce_scatter(total, share, self._world)
        # (ranks, 1 + pieces), fp64: the loss of a rank and the norms of its shares, the same table on every rank
        table = gather(torch.stack([loss_sum, *torch._foreach_norm(self._normed)]), self._world)
        norm = torch.linalg.vector_norm(table[:, 1:])
        self._update_shares(norm)
        self._optimizer.update_lp_params()
        torch._foreach_zero_(self._sums)
        rows = table.tolist()
        return sum(row[0] for row in rows), math.sqrt(sum(value**2 for row in rows for value in row[1:]))

    def _update_shares(self, norm: Tensor) -> None:
        base = self._optimizer.optimizer
        scale = None
        if self._max_grad_norm:
            scale = torch.add(self._clip_eps, norm, alpha=1 / self._max_grad_norm).clamp_(min=1).float()
        if not isinstance(base, PartitionedOptimizer):
            base.grad_scale, base.found_inf = scale, (norm - norm).ne_(0).float()
            base.step()
        elif norm.isfinite():  # synchronises the host: these optimizers have no kernel that checks
            if scale is not None:
                torch._foreach_div_(self._shares, scale)
            base.step()

    def _add_each_immediately(self) -> None:
        """Add each gradient to its sum as soon as it is computed: there are too many to hold together."""
        for group, sums in zip(self._optimizer.bf16_groups, self._optimizer.fp32_groups_gradients, strict=True):
            for parameter, total in zip(group, sums, strict=True):
                parameter.register_post_accumulate_grad_hook(functools.partial(_add, total))


def _add(total: Tensor, parameter: Tensor) -> None:
    assert parameter.grad is not None
    total.add_(parameter.grad.reshape(-1))
    parameter.grad = None


def _pieces(parameters: list[Parameter], total: Tensor) -> list[tuple[list[Parameter], Tensor]]:
    """Runs of one parameter, or of several up to PIECE_ELEMENTS, each with its slice of the flat sum."""
    runs: list[list[Parameter]] = []
    room = 0
    for parameter in parameters:
        if not runs or parameter.numel() > room:
            runs.append([])
            room = PIECE_ELEMENTS
        runs[-1].append(parameter)
        room -= parameter.numel()
    sizes = [sum(parameter.numel() for parameter in run) for run in runs]
    return list(zip(runs, total[: sum(sizes)].split(sizes), strict=True))
