"""Forward passes of decoder parts on our kernels: norms, LoRA linears, gated MLPs, attention with rotary embedding.

Each function replaces the `forward` of one module instance. Parameters, names and the module itself do not change, so
saving, merging and DeepSpeed's hooks work as before. H: hidden, B: batch, S: sequence.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from ft_dist_kernels.attention.op import segment_attention
from ft_dist_kernels.attention.ragged_segments import AnySegments
from ft_dist_kernels.backend import Backend
from ft_dist_kernels.linear import gains_from_onednn, linear_group
from ft_dist_kernels.lora.op import lora_linear_group
from ft_dist_kernels.rms_norm.op import rms_norm
from ft_dist_kernels.rope.op import rope, rope_merged
from torch import nn

from ft_dist.model.anatomy.probe import NormForm, glu
from ft_dist.model.families import Family
from ft_dist.model.fused.merged import Merged, lora_weights
from ft_dist.model.fused.recompute import recomputed


def norm_eps(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))


def norm_forward(module: Any, form: NormForm, *, backend: Backend) -> Any:
    """RMSNorm. Our decoder layer (`decoder_layer.py`) also uses the norm of hidden_states + residual, that sum, and
    `spare` columns after each row for the layers that read it.
    """
    eps = norm_eps(module)

    def forward(
        hidden_states: torch.Tensor, residual: torch.Tensor | None = None, *, with_sum: bool = False, spare: int = 0
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return rms_norm(
            hidden_states,
            module.weight,
            eps=eps,
            offset=form.offset,
            cast_before_weight=form.cast_before_weight,
            residual=residual,
            with_sum=with_sum,
            spare=spare,
            backend=backend,
        )

    return forward


def lora_forward(layer: Any, *, backend: Backend) -> Any:
    original = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weights = lora_weights(layer)
        if weights is None or kwargs.get("adapter_names") is not None:
            return original(x, *args, **kwargs)
        return lora_linear_group(x, [weights], backend=backend)[0]

    return forward


def linear_forward(layer: Any) -> Any:
    original = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not gains_from_onednn(x, layer.weight):
            return original(x)
        return linear_group(x, [(layer.weight, layer.bias)])[0]

    return forward


def linears(group: Merged, x: torch.Tensor, *, together: bool) -> list[torch.Tensor]:
    """Outputs of layers that read the same x: as one group if all or none have adapters, one by one otherwise.

    `together` is off under ZeRO-3, where each layer's weights are gathered at its own boundary.
    """
    layers = group.layers
    if together and all(hasattr(layer, "lora_A") for layer in layers):
        members = group.members()
        if members is not None:
            return lora_linear_group(x, members, backend=group.backend)
    if together and all(type(layer) is nn.Linear and gains_from_onednn(x, layer.weight) for layer in layers):
        return linear_group(x, [(layer.weight, layer.bias) for layer in layers])
    return [layer(x) for layer in layers]


def mlp_forward(
    module: Any,
    inputs: Merged,
    *,
    activation: str,
    together: bool,
    backend: Backend,
    recompute: Callable[[], bool],
) -> Any:
    """Gated MLP: down(act(gate(x)) * up(x)), with gate and up as two layers or as halves of one (Phi-3).

    `inputs` are gate and up; `spare` is the number of columns that they need after each row of x to run as one product.
    While `recompute()` is true, the backward pass recomputes the product of gate and up instead of keeping it.
    """
    down = Merged([module.down_proj], together=together, backend=backend)

    gated = glu(activation, backend=backend)

    def forward(x: torch.Tensor, *, spare: int = 0) -> torch.Tensor:
        # `up` is None if `gate` holds both halves
        parts = [inputs(x, spare)] if spare else linears(inputs, x, together=together)
        gate, up = parts if len(parts) == 2 else (parts[0], None)
        down_spare = down.spare(x)
        product = gated(gate, up, spare=down_spare)
        with _saved(product, gate, up, down_spare) if recompute() and product.requires_grad else nullcontext():
            return down(product, down_spare) if down_spare else module.down_proj(product)

    def _saved(product: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, spare: int) -> Any:
        gate, up = gate.detach(), None if up is None else up.detach()
        return recomputed(product, lambda: gated(gate, up, spare=spare))

    return forward


def attention_forward(module: Any, inputs: Merged, family: Family, *, together: bool, backend: Backend) -> Any:
    """Self-attention of the Llama family: q, k, v in one group, optional norms of q and k, rotary embedding fused.

    `inputs` are q, k and v, or the one layer that computes all three (Phi-3); `spare` is the number of columns that
    they need after each row of hidden_states to run as one product.

    The backend in the model's config computes attention itself, unless the caller passes the `segments` of packed rows
    (which `takes_segments` must allow).
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[type(module).__module__].eager_attention_forward
    config = module.config
    window = None
    if family.sliding_window:
        # Mistral and Phi-3 keep the window in the config; Qwen and Gemma set it per layer
        window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    options = {} if window is None else {"sliding_window": window}
    if getattr(module, "attn_logit_softcapping", None) is not None:
        options["softcap"] = module.attn_logit_softcapping

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        segments: AnySegments | None = None,
        spare: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        shape = hidden_states.shape[:-1]
        if spare:
            heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
            qkv = inputs(hidden_states, spare)
            q, k, v = rope_merged(qkv, *position_embeddings, heads=heads, kv_heads=kv_heads, backend=backend)
        else:
            parts = _qkv(module, linears(inputs, hidden_states, together=together))
            q, k, v = (part.view(*shape, -1, module.head_dim) for part in parts)
            if family.head_norms:
                q, k = module.q_norm(q), module.k_norm(k)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            q, k = rope(q, k, *position_embeddings, backend=backend)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)
        dropout = module.attention_dropout if module.training else 0.0
        if segments is not None:
            output = segment_attention(q, k, v, segments, scale=module.scaling, window=window, dropout_p=dropout)
            return module.o_proj(output.view(*shape, -1)), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
        output, weights = attend(
            module, q, k, v, attention_mask, dropout=dropout, scaling=module.scaling, **options, **kwargs
        )
        return module.o_proj(output.reshape(*shape, -1).contiguous()), weights

    return forward


def takes_segments(causal_lm: Any) -> bool:
    """Whether replaced attention can run sample by sample: with PyTorch's SDPA, and without soft-capped scores."""
    config = causal_lm.config.get_text_config()
    odd = ("attn_logit_softcapping", "use_bidirectional_attention")
    return config._attn_implementation == "sdpa" and not any(getattr(config, name, None) for name in odd)


def _qkv(module: Any, parts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    if len(parts) == 3:
        return parts
    kv_width = module.config.num_key_value_heads * module.head_dim
    q_width = module.config.num_attention_heads * module.head_dim
    return parts[0].split([q_width, kv_width, kv_width], dim=-1)
