"""Data that the parts of the loss exchange.

Shapes: N labelled tokens, H hidden, V vocabulary, R LoRA rank.
"""

from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """The scalars of the loss, and whether the softmax step is the Triton kernel."""

    lora_scale: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    triton: bool = False


class Head(NamedTuple):
    """weight (V, H), bias (V,), lora_a (R, H), lora_b (V, R)."""

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    options: Options = Options()


class Wanted(NamedTuple):
    """Which gradients to compute, in the order of the autograd Function's inputs."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora_a: bool = False
    lora_b: bool = False
    lora_hidden: bool = False


class Gradients(NamedTuple):
    """hidden and lora_hidden in hidden's dtype for the N labelled rows; the others whole, in fp32."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_hidden: Tensor | None


class PerToken(NamedTuple):
    """(N,) each: fp32, fp32, int32."""

    loss: Tensor
    nll: Tensor
    correct: Tensor
