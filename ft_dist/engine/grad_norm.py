"""The gradient norm of ZeRO 2 and 3 over all tensors at once.

DeepSpeed 0.19 takes the norm of each tensor by itself, and in stage 2 looks through each for values that are not finite
before that. Where a value is not finite, neither is the norm, for which DeepSpeed skips the step as well.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def judge_by_norm(optimizer: Any) -> None:
    """`optimizer` is DeepSpeed's, of a stage above 0, with its state on the device that computes."""
    optimizer.check_overflow = _leave_to_norm
    optimizer.get_grad_norm_direct = functools.partial(_norm, optimizer)


def _leave_to_norm(partition_gradients: bool = True) -> None:
    pass


def _norm(optimizer: Any, gradients: list[Tensor], params: Any, norm_type: int = 2) -> Tensor:
    """The L2 norm of a parameter group over all ranks, a scalar (fp32); `gradients` are those that this rank holds."""
    assert norm_type == 2
    held = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    total = torch.zeros((), dtype=torch.float32, device=optimizer.device)
    if held:
        total = torch.stack(torch._foreach_norm(held, dtype=torch.float32)).square().sum()
    dist.all_reduce(total, group=optimizer.dp_process_group)
    return total.sqrt()
