"""The gradient norm of ZeRO 2 and 3, over all tensors in one operation.

DeepSpeed 0.19 computes the norm tensor by tensor, and in stage 2 first scans each tensor for values that are not
finite. If a value is not finite, neither is the norm, and DeepSpeed skips the step for that as well.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def judge_by_norm(optimizer: Any) -> None:
    """`optimizer` is DeepSpeed's at a stage above 0, with its state on the compute device."""
    optimizer.check_overflow = _leave_to_norm
    optimizer.get_grad_norm_direct = functools.partial(_norm, optimizer)


def _leave_to_norm(partition_gradients: bool = True) -> None:
    pass


def _norm(optimizer: Any, gradients: list[Tensor], params: Any, norm_type: int = 2) -> Tensor:
    """The L2 norm of a parameter group over all ranks, a scalar (fp32); `gradients` are this rank's."""
    assert norm_type == 2
    held = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    total = torch.zeros((), dtype=torch.float32, device=optimizer.device)
    if held:
        total = torch.stack(torch._foreach_norm(held, dtype=torch.float32)).square().sum()
    dist.all_reduce(total, group=optimizer.dp_process_group)
    return total.sqrt()
