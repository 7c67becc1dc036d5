"""The one place that replaces forward passes: instances of known modules get those that call our kernels.

Classes of transformers and peft are never patched. Unknown modules keep their forward and are named in the report, so
nothing falls back silently. Under ZeRO-3 a LoRA layer reads the weights of its inner layers directly, bypassing their
gathering hooks, so each of these parameters is registered with the layer that reads it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from ft_dist_kernels.attention.ragged import KERNEL_NAMES, attention_kernel
from ft_dist_kernels.backend import HAS_TRITON, Backend
from torch import nn

from ft_dist.errors import ModelError
from ft_dist.model.anatomy.decoder import decoder_of
from ft_dist.model.anatomy.probe import is_gated_mlp, norm_form
from ft_dist.model.families import FAMILIES, Family
from ft_dist.model.fp8 import FP8Linear
from ft_dist.model.fused.decoder_layer import is_decoder_layer, layer_forward, layer_norms
from ft_dist.model.fused.forward import (
    attention_forward,
    linear_forward,
    lora_forward,
    mlp_forward,
    norm_eps,
    norm_forward,
    takes_segments,
)
from ft_dist.model.fused.merged import Merged

ATTENTION = "attention (qkv, rotary)"
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj")
MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")


@dataclass
class FusedReport:
    """Which modules use our kernels, by kind, and which keep Hugging Face's forward and why."""

    backend: Backend | Literal["off"]
    fused: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    segments: bool = False
    """Whether every layer accepts the segments of packed rows instead of a mask over whole rows"""
    attention: str = ""
    """The attention kernel used then on a GPU"""
    swapped: list[nn.Module] = field(default_factory=list)
    """The modules whose forward is replaced"""

    @property
    def head_backend(self) -> Backend | None:
        """The kernels for output head and loss; None leaves both to PyTorch."""
        return None if self.backend == "off" else self.backend

    def add_head(self, reason_unfused: str | None) -> None:
        if self.backend != "off" and reason_unfused is None:
            self.fused["output head with loss"] += 1
        elif reason_unfused:
            self.left[reason_unfused] += 1

    def line(self) -> str:
        if self.backend == "off":
            return "kernels: off, using Hugging Face's layers"
        done = ", ".join(f"{count} {kind}" for kind, count in self.fused.items() if count) or "nothing"
        rest = "; ".join(f"{count} x {why}" if count > 1 else why for why, count in self.left.items())
        attention = f"; {self.attention}" if self.attention else ""
        return f"kernels ({self.backend}): {done} fused{attention}" + (f"; not fused: {rest}" if rest else "")


def chosen_backend(kernels: str, *, device_type: str) -> Backend:
    """`auto` is Triton on a GPU and PyTorch elsewhere. Raises ModelError if Triton is requested but cannot run."""
    if kernels == "triton" and (device_type != "cuda" or not HAS_TRITON):
        missing = "a GPU" if device_type != "cuda" else "the triton package"
        raise ModelError(f"model.kernels=triton needs {missing}. Use auto, which selects PyTorch kernels here.")
    if kernels == "auto":
        return "triton" if device_type == "cuda" and HAS_TRITON else "torch"
    return "triton" if kernels == "triton" else "torch"


def fuse(causal_lm: Any, *, kernels: str, device_type: str, zero3: bool) -> FusedReport:
    """Replace the forward of every known module instance; `causal_lm` may already have peft adapters."""
    if kernels == "off":
        return FusedReport("off")
    backend = chosen_backend(kernels, device_type=device_type)
    report = FusedReport(backend)
    model_type = causal_lm.config.model_type
    family = FAMILIES.get(model_type)
    if family is None:
        report.left[f"layers of architecture {model_type}, which is not among {', '.join(FAMILIES)}"] += 1
    modules = list(decoder_of(causal_lm).modules())
    layer_of = {module.mlp: module for module in modules if family and is_decoder_layer(module, family)}
    groups: dict[nn.Module, Merged] = {}
    for module in modules:
        _fuse_lora(module, report, backend, zero3)
        if family:
            layer = layer_of.get(module)
            _fuse_part(module, family, report, backend, together=not zero3, layer=layer, groups=groups)
    for layer in layer_of.values():
        assert family is not None
        if not all(_is_swapped(getattr(layer, name)) for name in layer_norms(family)):
            continue
        _swap(layer, layer_forward(layer, groups, sandwich=family.sandwich_norms))
        report.fused["decoder layers (residual sums)"] += 1
    report.swapped = [module for module in modules if _is_swapped(module)]
    config = causal_lm.config.get_text_config()
    report.segments = report.fused[ATTENTION] == config.num_hidden_layers and takes_segments(causal_lm)
    if report.segments and device_type == "cuda":
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        device = torch.device("cuda", torch.cuda.current_device())
        report.attention = KERNEL_NAMES[attention_kernel(device, causal_lm.dtype, width)]
    return report


def _fuse_lora(module: nn.Module, report: FusedReport, backend: Backend, zero3: bool) -> None:
    if not hasattr(module, "lora_A") or not hasattr(module, "get_base_layer"):
        return
    base = module.get_base_layer()
    plain = type(base) in (nn.Linear, FP8Linear) and type(module).__name__ == "Linear"
    if not plain or not isinstance(module, nn.Module):
        report.left[f"LoRA on {type(base).__name__}: no kernel for it"] += 1
        return
    if zero3:
        register_parameters(module, list(module.parameters()))
    _swap(module, lora_forward(module, backend=backend))
    report.fused["LoRA linears"] += 1


def _fuse_part(
    module: Any,
    family: Family,
    report: FusedReport,
    backend: Backend,
    *,
    together: bool,
    layer: Any,
    groups: dict[nn.Module, Merged],
) -> None:
    """`layer` is the decoder layer of an MLP, if known. Adds to `groups` the layers that read the module's input."""
    name = type(module).__name__
    if type(module) is nn.Linear and backend == "torch":
        _swap(module, linear_forward(module))
    if name == f"{family.classes}RMSNorm":
        form = norm_form(module, eps=norm_eps(module))
        if form is None:
            report.left[f"{name} of a form of its own"] += 1
            return
        _swap(module, norm_forward(module, form, backend=backend))
        report.fused["RMSNorm"] += 1
    elif name == f"{family.classes}MLP":
        activation = getattr(module.config, family.activation_key)
        if activation not in ACTIVATIONS or not is_gated_mlp(module, activation):
            report.left[f"{name} with activation {activation}"] += 1
            return

        def recompute() -> bool:
            # it would be slower on CPU; under activation checkpointing it saves nothing, and would keep gate and up
            return backend == "triton" and layer is not None and not layer.gradient_checkpointing

        group = groups[module] = Merged(_present(module, MLP_INPUTS), together=together, backend=backend)
        options: dict[str, Any] = {"activation": activation, "together": together, "backend": backend}
        _swap(module, mlp_forward(module, group, recompute=recompute, **options))
        report.fused["gated MLP"] += 1
    elif name == f"{family.classes}Attention":
        # the norms of q and k need them as separate tensors
        merges = together and not family.head_norms
        group = groups[module] = Merged(_present(module, ATTENTION_INPUTS), together=merges, backend=backend)
        _swap(module, attention_forward(module, group, family, together=together, backend=backend))
        report.fused[ATTENTION] += 1


def _present(module: nn.Module, names: Sequence[str]) -> list[Any]:
    return [getattr(module, name) for name in names if hasattr(module, name)]


def register_parameters(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Have ZeRO-3 gather `parameters` one by one when `module` runs, forward and backward."""
    import deepspeed

    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)


def _swap(module: nn.Module, forward: Any) -> None:
    # on the instance only: the class and other models are unaffected
    module.forward = forward


def _is_swapped(module: nn.Module) -> bool:
    return "forward" in vars(module)


@contextmanager
def own_forwards(report: FusedReport) -> Iterator[None]:
    """Inside, every module has its class's forward, as transformers (and peft) wrote it."""
    ours = [(module, vars(module).pop("forward")) for module in report.swapped]
    try:
        yield
    finally:
        for module, forward in ours:
            module.forward = forward
