"""Parameter groups, AdamW, and learning rates as a pure function of the step.

The schedule keeps no state: `learning_rate(step)` is all that a resumed run needs.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from ft_dist.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, *, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (1-based) in a run of `total_steps`.

    Warm-up is linear from lr / warmup_steps; cosine (Loshchilov & Hutter, arXiv 1608.03983) and linear go towards
    lr * min_lr_ratio, which the step after the last would have, so that no step is wasted at a rate of 0; wsd (Hu et
    al., arXiv 2404.06395) holds lr and decays linearly over the last `decay_steps`.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    done = step - 1
    if optim.schedule == "constant":
        return optim.lr
    floor = optim.lr * optim.min_lr_ratio
    if optim.schedule == "wsd":
        decay_steps = optim.decay_steps if optim.decay_steps is not None else max(1, total_steps // 10)
        start = max(optim.warmup_steps, total_steps - decay_steps)
        share = min(1.0, max(0.0, (total_steps - done) / max(1, total_steps - start)))
        return floor + (optim.lr - floor) * share
    progress = min(1.0, (done - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return floor + (optim.lr - floor) * share


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Trainable parameters in one group, or two with weight decay on matrices only, as is usual for AdamW."""
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    matrices = [parameter for _, parameter in trainable if _ndim(parameter) >= 2]
    vectors = [parameter for _, parameter in trainable if _ndim(parameter) < 2]
    if weight_decay == 0:
        return [{"params": [parameter for _, parameter in trainable], "weight_decay": 0.0}]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _ndim(parameter: torch.nn.Parameter) -> int:
    # a ZeRO-3 parameter is an empty vector between its uses; its real shape stays in ds_shape
    return len(getattr(parameter, "ds_shape", parameter.shape))


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW in torch's fused form, on GPUs and, for offloaded state, on the host.

    DeepSpeed's own Adams do the same arithmetic, but are compiled on first use: that needs a compiler on every node,
    and a build that is interrupted leaves a lock on which every later run waits for ever. The rate is 0 until the first
    step sets it: DeepSpeed takes a trial step to create its state, which must not decay any weight.
    """
    return torch.optim.AdamW(groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
