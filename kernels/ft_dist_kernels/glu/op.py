"""Gated linear units: the activation of one half times the other half, in one pass.

    swiglu: silu(gate) up,   silu(g) = g sigmoid(g)
    geglu:  gelu(gate) up,   gelu(g) = g Phi(g), or its tanh approximation

Backward, from gate and up alone (nothing else is saved):

    dup = dy act(gate),   dgate = dy up act'(gate)

With `up=None` gate and up are the two halves of one tensor (..., 2I), as Phi-3's gate_up_proj computes them; their
gradient is then one tensor too, without the concatenation that splitting outside would cost. Inputs and upstream
gradients are never overwritten: autograd may need them again.

The Triton kernels compute in fp32 and round once. The CPU form rounds where PyTorch's operators do, so its forward
pass has the bits of `act(gate) * up`; widening bf16 explicitly took twice the time (measured).

Shapes: T rows (any leading shape), I width of a half.
Source: Shazeer (arXiv 2002.05202).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.backend import Backend, use_triton
from ft_dist_kernels.tiles import empty_with_spare, tiles

Activation = Literal["silu", "gelu_tanh", "gelu"]

_APPROXIMATE = {"gelu_tanh": "tanh", "gelu": "none"}


def swiglu(gate: Tensor, up: Tensor | None = None, *, spare: int = 0, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up for gate and up (..., I), or for the halves of one gate (..., 2I), with any strides.

    With `spare` the result is the first I columns of a buffer whose rows are longer by `spare` columns, not written.
    """
    return _glu(gate, up, "silu", spare, backend)


def geglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    approximate: Literal["tanh", "none"] = "tanh",
    spare: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """gelu(gate) * up, as `swiglu`."""
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate={approximate!r} is not one of 'tanh', 'none'.")
    return _glu(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu", spare, backend)


def swiglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.silu(gate) * up


def geglu_reference(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """The same in plain PyTorch."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.gelu(gate, approximate=approximate) * up


def _glu(gate: Tensor, up: Tensor | None, activation: Activation, spare: int, backend: Backend) -> Tensor:
    if gate.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"gate has dtype {gate.dtype}; it must be fp32, bf16 or fp16. Use gate.float().")
    if up is None and (gate.dim() < 1 or gate.shape[-1] % 2):
        raise ValueError(f"gate has shape {tuple(gate.shape)}; without up its last dimension holds two equal halves.")
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype or gate.dim() < 1):
        raise ValueError(
            f"gate is {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)}; they must agree."
        )
    return _run(gate, up, activation, spare, use_triton(gate, backend))


@torch._disable_dynamo
def _run(*arguments: Any) -> Tensor:
    return _Glu.apply(*arguments)


def _rows(tensor: Tensor) -> Tensor:
    """(T, I) with unit stride along I; a view wherever one exists."""
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.reshape(0, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return _rows(gate), _rows(up)
    gate_TI, up_TI = _rows(gate).chunk(2, -1)
    return gate_TI, up_TI


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: Activation, spare: int, triton: bool) -> Tensor:
        gate_TI, up_TI = _halves(gate, up)
        y, y_TI = empty_with_spare((*gate.shape[:-1], gate_TI.shape[1]), spare, like=gate)
        (_triton_kernels().forward_triton if triton else forward_torch)(gate_TI, up_TI, y_TI, activation)
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.triton = activation, triton
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        gate_TI, up_TI = _halves(gate, up)
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = None if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)
        backward = _triton_kernels().backward_triton if ctx.triton else backward_torch
        backward(gate_TI, up_TI, _rows(dy), *_halves(dgate, dup), ctx.activation)
        return dgate, dup, None, None, None


def forward_torch(gate_TI: Tensor, up_TI: Tensor, y_TI: Tensor, activation: Activation) -> None:
    for gate, up, y in tiles(gate_TI.shape[1], gate_TI, up_TI, y_TI):
        _activate(gate, activation, y)
        y.mul_(up)


def backward_torch(
    gate_TI: Tensor,
    up_TI: Tensor,
    dy_TI: Tensor,
    dgate_TI: Tensor,
    dup_TI: Tensor,
    activation: Activation,
) -> None:
    for gate, up, dy, dgate, dup in tiles(gate_TI.shape[1], gate_TI, up_TI, dy_TI, dgate_TI, dup_TI):
        _activate(gate, activation, dup)
        dup.mul_(dy)
        dact = dy * up
        if activation == "silu":
            torch.ops.aten.silu_backward.grad_input(dact, gate, grad_input=dgate)
        else:
            torch.ops.aten.gelu_backward.grad_input(dact, gate, approximate=_APPROXIMATE[activation], grad_input=dgate)


def _activate(gate: Tensor, activation: Activation, out: Tensor) -> None:
    if activation == "silu":
        torch.ops.aten.silu.out(gate, out=out)
    else:
        torch.ops.aten.gelu.out(gate, approximate=_APPROXIMATE[activation], out=out)


def _triton_kernels() -> Any:
    from ft_dist_kernels.glu import kernels as glu_kernels

    return glu_kernels


def aot_cases(chip: Chip) -> list[AotCase]:
    """Llama-3-8B (SwiGLU, I=14336), Gemma (GEGLU, I=10240) and the exact GELU, bf16."""
    return _triton_kernels().aot_cases(chip)
