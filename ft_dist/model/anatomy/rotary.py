"""Whether a model's rotary angles follow from each position alone."""

import copy
from typing import Any

import torch
from torch import nn

SHORT = 16


def depends_on_longest(causal_lm: nn.Module, longest: int) -> bool:
    """Whether a sample's rotary angles change when another sample of its micro-batch has `longest` tokens.

    LongRoPE picks one of two sets of frequencies for a whole forward, by its largest position. Measured by running each
    rotary module on positions alone; weights and state stay as they are.
    """
    return any(_depends(module, longest) for module in causal_lm.modules() if _is_rotary(module))


def _is_rotary(module: nn.Module) -> bool:
    return any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))


def _depends(module: nn.Module, longest: int) -> bool:
    types = getattr(module, "rope_type", None)
    layer_types = [{"layer_type": name} for name in types] if isinstance(types, dict) else [{}]
    try:
        return any(
            not torch.equal(short, far[..., :SHORT, :])
            for options in layer_types
            for short, far in zip(
                _angles(module, SHORT, SHORT, options), _angles(module, SHORT, longest, options), strict=True
            )
        )
    except Exception:  # any code of any model: not a rotary module that takes positions
        return False


@torch.no_grad()
def _angles(module: nn.Module, count: int, longest: int, options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """What the module returns for `count` positions, the first ones, and the last of `longest`."""
    device = next(module.buffers()).device
    positions = torch.tensor([[*range(count), longest - 1]], device=device)
    found = copy.deepcopy(module)(torch.zeros(1, 1, 1, device=device), positions, **options)
    return tuple(part[..., :count, :] for part in (found if isinstance(found, tuple) else (found,)))
