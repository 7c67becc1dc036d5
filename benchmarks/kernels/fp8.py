"""A group of LoRA linears over a base held in FP8, compared with the same group in bf16.

Errors are compared with those of the emulation on CPU, which rounds the same way: a GPU's error may be at most twice
that.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from ft_dist_kernels.lora.op import LoraWeights, lora_linear_group
from ft_dist_kernels.quantised.fp8 import fp8_reason_not, hold_fp8, takes_fp8
from ft_dist_kernels.quantised.fp8_format import FP8Weight
from torch import Tensor

from benchmarks.kernels.harness import Case


def fp8_here(inner: int, outers: tuple[int, ...]) -> bool:
    """Whether this machine multiplies in FP8, or emulates it, and these sizes fit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return fp8_reason_not(device) is None and all(takes_fp8(outer, inner) for outer in outers)


class Held:
    """The weights in FP8, built on the first read and on the device of that read."""

    def __init__(self) -> None:
        self._weights: list[FP8Weight] = []

    def of(self, dense: list[Tensor]) -> list[FP8Weight]:
        self._weights = self._weights or hold_fp8(dense)
        return self._weights


def on_fp8(case: Case, *, members: int, scale: float) -> Case:
    """`case` (of `lora_linear`, without dropout) with its base in FP8."""

    def make(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
        return case.make(tokens, dtype, device) | {"held": Held()}

    def ours(x: Tensor, held: Held, **w: Tensor) -> tuple[Tensor, ...]:
        weights = held.of([w[f"w{i}"] for i in range(members)])
        group = [LoraWeights(weights[i], None, w[f"a{i}"], w[f"b{i}"], scale) for i in range(members)]
        return tuple(lora_linear_group(x, group))

    def emulated(x: Tensor, held: Held, **w: Tensor) -> tuple[Tensor, ...]:
        outputs = ours(x.cpu(), Held(), **{name: tensor.cpu() for name, tensor in w.items()})
        return tuple(output.to(x.device) for output in outputs)

    def without(function: Callable[..., Any] | None) -> Callable[..., Any]:
        assert function is not None
        return lambda held, **inputs: function(**inputs)

    return replace(
        case,
        op="fp8_linear",
        make=make,
        ours=ours,
        eager=without(case.eager),
        floor=without(case.floor),
        truth=without(case.truth),
        yardstick=emulated,
    )
