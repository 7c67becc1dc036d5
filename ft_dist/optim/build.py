"""Parameter groups, and the optimizer of `optim.kind`."""

from collections.abc import Iterable
from typing import Any

import torch

from ft_dist.config.schema import OptimConfig
from ft_dist.optim.adamw_8bit import AdamW8bit
from ft_dist.optim.muon import Muon

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]


def parameter_groups(named_parameters: NamedParameters, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups by weight decay (matrices only, as usual) and update rule.

    Muon updates matrices inside the network; AdamW updates embeddings, the output head and vectors.
    """
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            matrix = _ndim(parameter) >= 2
            orthogonal = optim.kind == "muon" and _ndim(parameter) == 2 and not _at_the_ends(name)
            decay = optim.weight_decay if matrix else 0.0
            groups.setdefault((orthogonal, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay} | ({"orthogonal": orthogonal} if optim.kind == "muon" else {})
        for (orthogonal, decay), parameters in groups.items()
    ]


def _ndim(parameter: torch.nn.Parameter) -> int:
    # a ZeRO-3 parameter is an empty vector between uses; ds_shape holds its real shape
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _at_the_ends(name: str) -> bool:
    return any("embed" in part or part == "lm_head" for part in name.split("."))


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `optim.kind`, for parameters on GPUs or, with offload, on the host.

    AdamW is torch's fused form. DeepSpeed's Adams do the same arithmetic but are compiled on first use: that needs a
    compiler on every node, and an interrupted build leaves a lock that blocks every later run. The rate is 0 until the
    first step sets it: DeepSpeed takes a trial step to create its state, which must not decay any weight.
    """
    betas = (optim.beta1, optim.beta2)
    if optim.kind == "adamw_8bit":
        return AdamW8bit(groups, betas=betas, eps=optim.eps)
    if optim.kind == "muon":
        return Muon(groups, momentum=optim.momentum, betas=betas, eps=optim.eps)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=optim.eps, fused=True)
