"""What a layer computes, found by running its own `forward` on small inputs rather than by its class's name.

Gemma 3 multiplies normalised values by 1 + weight and Gemma 4 by weight, Qwen 3 by weight and Qwen 3.5 by 1 + weight;
Falcon H1's MLP scales its gate. A wrong guess would train, with a worse loss.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from ft_dist_kernels.glu.op import geglu, swiglu
from ft_dist_kernels.rms_norm.op import rms_norm
from torch import nn

ROWS, WIDTH, INNER = 8, 64, 96
MLP_INPUTS = ("gate_proj", "up_proj"), ("gate_up_proj",)


class NormForm(NamedTuple):
    """y = n (weight + offset), with n in fp32, or rounded to x's dtype before the weight (`cast_before_weight`)."""

    offset: float
    cast_before_weight: bool


FORMS = NormForm(0.0, True), NormForm(0.0, False), NormForm(1.0, False)


def norm_form(module: Any, *, eps: float) -> NormForm | None:
    """How an RMSNorm with a weight uses it; None if it computes anything else. bf16 reveals where it rounds."""
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    draw = torch.Generator().manual_seed(0)
    # rows small enough that eps matters in some
    x = (torch.randn(ROWS, WIDTH, generator=draw) * torch.logspace(-4, 1, ROWS)[:, None]).bfloat16()
    weight = nn.Parameter(torch.randn(WIDTH, generator=draw).bfloat16(), requires_grad=False)
    own = _run(module, x, parameters={"weight": weight})

    def explains(form: NormForm) -> bool:
        ours = rms_norm(
            x, weight, eps=eps, offset=form.offset, cast_before_weight=form.cast_before_weight, backend="torch"
        )
        # a rounding step of the sum may differ, the place of a rounding shows in a third of the elements
        return own is not None and own.shape == ours.shape and (own != ours).float().mean().item() < 0.02

    return next((form for form in FORMS if explains(form)), None)


def is_gated_mlp(module: Any, activation: str) -> bool:
    """Whether the module computes down(activation(gate(x)) * up(x)), gate and up separate or the halves of one."""
    parts = {name for name, _ in module.named_children()}
    inputs = next((names for names in MLP_INPUTS if parts >= {*names, "down_proj"}), None)
    if inputs is None:
        return False
    layers = {name: _linear(INNER * (3 - len(inputs)), WIDTH) for name in inputs} | {"down_proj": _linear(WIDTH, INNER)}
    # large enough to reach a clamp
    x = 20 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    own = _run(module, x, children=layers)
    product = glu(activation)(*(layers[name](x) for name in inputs))
    return own is not None and torch.allclose(own, layers["down_proj"](product), rtol=1e-4, atol=1e-4)


def is_linear(module: Any) -> bool:
    """Whether a subclass of `nn.Linear` computes what `nn.Linear` does."""
    if type(module).forward is nn.Linear.forward:
        return True
    layer = _linear(INNER, WIDTH)
    bias = None if module.bias is None else torch.randn(INNER, generator=torch.Generator().manual_seed(1))
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    own = _run(module, x, parameters=dict(layer._parameters), sizes={"in_features": WIDTH, "out_features": INNER})
    return own is not None and own.shape == (ROWS, INNER) and torch.allclose(own, layer(x), rtol=1e-4, atol=1e-4)


def glu(activation: str, **options: Any) -> Callable[..., torch.Tensor]:
    """The kernel of a gated activation, by its name in transformers."""

    def gated(gate: torch.Tensor, up: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        if activation == "silu":
            return swiglu(gate, up, **options, **more)
        approximate: Any = "tanh" if activation == "gelu_pytorch_tanh" else "none"
        return geglu(gate, up, approximate=approximate, **options, **more)

    return gated


def _linear(out: int, width: int) -> nn.Linear:
    layer = nn.Linear(width, out, bias=False)
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(out)) / width**0.5
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@torch.no_grad()
def _run(
    module: nn.Module,
    x: torch.Tensor,
    *,
    parameters: dict[str, Any] | None = None,
    children: dict[str, nn.Module] | None = None,
    sizes: dict[str, int] | None = None,
) -> torch.Tensor | None:
    """Output of the class's `forward` with some parameters, children and sizes replaced; None if it fails on them."""
    stand_in = copy.copy(module)
    vars(stand_in).update(sizes or {})
    vars(stand_in)["_parameters"] = {**module._parameters, **(parameters or {})}
    vars(stand_in)["_modules"] = {**module._modules, **(children or {})}
    try:
        output = type(module).forward(stand_in, x)
    except Exception:  # any code of any model: then it is not the layer that we know
        return None
    return output if isinstance(output, torch.Tensor) else None
