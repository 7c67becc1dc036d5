"""`model.base_dtype: fp8`: the frozen linear layers of a decoder in e4m3 (see `ft_dist_kernels.quantised.fp8`).

Layers that read the same x (q, k, v; gate, up) share one matrix. Embeddings, norms, the output head and adapters keep
their dtype. The weights are not parameters, because DeepSpeed casts and flattens parameters and nothing trains these.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from ft_dist_kernels.quantised.fp8 import fp8_linear, fp8_reason_not, hold_fp8, takes_fp8
from ft_dist_kernels.quantised.fp8_format import FP8Weight
from torch import nn

from ft_dist.config.schema import ModelConfig
from ft_dist.errors import ModelError
from ft_dist.model.anatomy.decoder import decoder_of
from ft_dist.model.families import FAMILIES

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that read the same x"""


class FP8Linear(nn.Module):
    """Replaces an `nn.Linear`, inside a peft layer or alone."""

    def __init__(self, weight: FP8Weight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias

    @property
    def held(self) -> int:
        """Elements of the weight, which `parameters()` does not count."""
        return self.out_features * self.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, e4m3 both ways"


@dataclass
class FP8Report:
    """How many layers are in FP8, and which were left unchanged and why."""

    device_type: str
    held: int = 0
    left: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        how = "; emulated on CPU: same results, but slower" if self.device_type == "cpu" else ""
        rest = "".join(f"; {count} unchanged: {why}" for why, count in self.left.items())
        return f"base weights in fp8: {self.held} linears{rest}{how}"


def refuse_without_fp8(model: ModelConfig, device: torch.device) -> None:
    """Raises ModelError if `device` cannot multiply in FP8, or not with `model.dtype`."""
    reason = fp8_reason_not(device)
    if reason is None and device.type == "cuda" and model.dtype != "bf16":
        reason = f"FP8 products are bf16, but model.dtype={model.dtype}"
    if reason is not None:
        raise ModelError(f"model.base_dtype=fp8: {reason}. Remove the key, or set model.dtype=bf16 on a GPU with FP8.")


def hold_base_in_fp8(causal_lm: Any) -> FP8Report:
    """Replace the frozen linear layers of the decoder, one group at a time, so that at most one weight exists twice.

    `causal_lm` is on its final device and has its adapters. Raises ModelError for an unknown architecture.
    """
    family = causal_lm.config.model_type
    if family not in FAMILIES:
        raise ModelError(
            f"model.base_dtype=fp8: architecture {family} is not supported, only {', '.join(FAMILIES)}. Remove the key."
        )
    report = FP8Report(next(causal_lm.parameters()).device.type)
    for parent in list(decoder_of(causal_lm).modules()):
        if not hasattr(parent, "get_base_layer") and not isinstance(parent, nn.ModuleDict):  # adapters
            for names in _groups(parent):
                _hold(parent, names, report)
    return report


def held_elements(model: nn.Module) -> int:
    """Number of weights in FP8, which are not parameters."""
    return sum(module.held for module in model.modules() if isinstance(module, FP8Linear))


def _groups(parent: nn.Module) -> Iterator[tuple[str, ...]]:
    """Names of the module's linear layers, grouped where they read the same x."""
    names = [name for name, child in parent.named_children() if _linear(child) is not None]
    for group in TOGETHER:
        if all(name in names for name in group):
            yield group
            names = [name for name in names if name not in group]
    yield from ((name,) for name in names)


def _linear(module: nn.Module) -> nn.Linear | None:
    """The layer itself, or the base layer of its adapters."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return base if type(base) is nn.Linear else None


def _hold(parent: nn.Module, names: tuple[str, ...], report: FP8Report) -> None:
    layers = [getattr(parent, name) for name in names]
    linears = [linear for layer in layers if (linear := _linear(layer)) is not None]
    odd = [linear for linear in linears if not takes_fp8(linear.out_features, linear.in_features)]
    if odd or any(linear.weight.requires_grad for linear in linears):
        why = f"{odd[0].out_features} x {odd[0].in_features}, not multiples of 16" if odd else "trained"
        report.left[why] += len(linears)
        return
    for name, layer, linear, weight in zip(
        names, layers, linears, hold_fp8([linear.weight for linear in linears]), strict=True
    ):
        held = FP8Linear(weight, linear.bias)
        if layer is linear:
            setattr(parent, name, held)
        else:
            layer.base_layer = held
        report.held += 1
