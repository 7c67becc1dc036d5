"""PyTorch's attention as a GPU runs it, with flash or memory-efficient operators, which a CPU build never chooses."""

from typing import Any

FORWARD = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_varlen_attn",
)


class AttentionError(AssertionError):
    """A call that no fast kernel supports."""


def on_device() -> None:
    import torch

    aten, original = torch.ops.aten, torch.nn.functional.scaled_dot_product_attention

    def attend(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if query.device.type != "cuda":
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if {key.device, value.device} != {query.device}:
            raise AttentionError(f"attention of {query.device} over {key.device} and {value.device}")
        lower_right = type(attn_mask).__name__ == "CausalBias"
        if attn_mask is None or lower_right:
            causal = is_causal or lower_right
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, causal, scale=scale)[0]
        if enable_gqa and key.shape[1] != query.shape[1]:
            raise AttentionError("a dense mask together with enable_gqa: CUDA has only the unfused form for it")
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        bias = attn_mask.expand(*query.shape[:3], key.shape[2])
        logsumexp_too = torch.is_grad_enabled()
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, logsumexp_too, dropout_p, is_causal, scale=scale
        )[0]

    torch.nn.functional.scaled_dot_product_attention = attend
    torch.backends.cuda.is_flash_attention_available = lambda: True


def efficient_backward(args: Any) -> tuple[Any, ...]:
    """The results of `_efficient_attention_backward`. torch's own fake version takes different arguments."""
    import torch

    _, query, key, value, bias = args[:5]
    return (
        *map(torch.empty_like, (query, key, value)),
        query.new_empty(()) if bias is None else torch.empty_like(bias),
    )


def shape_of(name: str, args: Any, kwargs: Any) -> str:
    """The key of a call's plan: shapes, lengths and causality."""
    import torch

    shapes = [tuple(arg.shape) if isinstance(arg, torch.Tensor) else arg for arg in (*args, *kwargs.values())]
    return f"{name} {shapes}"
