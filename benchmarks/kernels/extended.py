"""A group of LoRA linears as one product over an extended weight, compared with the same group as separate products."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from ft_dist_kernels.lora.extended import ExtendedWeight, extended_spare, lora_linear_extended
from ft_dist_kernels.lora.op import LoraWeights
from torch import Tensor

from benchmarks.kernels.harness import Case


def as_one(case: Case, *, members: int, rank: int, scale: float, dropout: float) -> Case:
    """`case` (of `lora_linear`, with this dropout) as one product.

    Eager's outputs are concatenated as ours are, which costs it a pass; the floor's are not.
    """
    ranks = (rank,) * members
    spare = extended_spare(ranks)

    def make(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
        inputs = case.make(tokens, dtype, device)
        weights = [inputs[f"w{i}"] for i in range(members)]
        extended = ExtendedWeight.extend(weights, [None] * members, ranks, dtype)
        x_TI = inputs["x"].detach()
        # what the op must overwrite holds NaN
        x_TK = x_TI.new_full((tokens, x_TI.shape[1] + spare), float("nan"))
        x_TK[:, : x_TI.shape[1]] = x_TI
        views = {f"w{i}": view for i, view in enumerate(extended.views)}
        return inputs | views | {"x": x_TK[:, : x_TI.shape[1]].requires_grad_(), "extended": extended}

    def ours(x: Tensor, extended: ExtendedWeight, **w: Tensor) -> Tensor:
        group = [
            LoraWeights(w[f"w{i}"], None, w[f"a{i}"], w[f"b{i}"], scale, dropout, i if dropout else None)
            for i in range(members)
        ]
        return lora_linear_extended(x, extended, group, spare=spare)

    def joined(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda x, extended, **w: torch.cat(function(x, **w), 1)

    def floor(x: Tensor, extended: ExtendedWeight, **w: Tensor) -> Tensor:
        touch = sum(w[f"{k}{i}"].sum() for i in range(members) for k in "ab") * 0.0
        return F.linear(x, extended.buffer[:, : x.shape[1]]) + touch

    assert case.truth is not None
    truth = joined(case.truth)
    return replace(
        case,
        op="lora_extended",
        make=make,
        ours=ours,
        eager=joined(case.eager),
        floor=floor,
        truth=truth,
        yardstick=truth,
        views=True,
    )
