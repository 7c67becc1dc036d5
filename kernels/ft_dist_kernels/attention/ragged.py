"""Causal attention over ragged segments on a GPU: one variable-length call per layer, for any sample lengths.

There are three kernels, all compiled ahead of time, so new shapes cost nothing. Each backward pass gives the same bits
every time, which bit-exact resume requires (cuDNN's does not, and builds a plan for every shape):

- `flash3`: the FlashAttention 3 package, on Hopper, for bf16 and fp16 up to 128 wide. Some builds accept
  `deterministic=True` and ignore it, so its determinism is tested first (`_repeats_its_bits`).
- `flash`: FlashAttention 2 as shipped with PyTorch, for bf16 and fp16 up to 256 wide, from Ampere on. The backward pass
  is ours up to 128 wide (`ragged_backward_kernels.py`): FlashAttention 2's is slow on Hopper (166 TFLOP/s on an H100
  according to its authors, github.com/Dao-AILab/flash-attention/pull/1893), and slower, with large partial sums, in its
  deterministic form. For wider heads PyTorch's determinism flag is set around that one call.
- `efficient`: PyTorch's memory-efficient kernel, for fp32 and everything else. It does not support grouped heads, so
  keys and values are repeated.

On CPU the reference runs, which tests everything around the kernel without a GPU.

Shapes: T tokens, K places of keys, N heads, M key heads, D head width.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from ft_dist_kernels.attention.ragged_segments import RaggedSegments
from ft_dist_kernels.backend import use_triton

Kernel = Literal["flash3", "flash", "efficient", "reference"]

KERNEL_NAMES: dict[Kernel, str] = {
    "flash3": "FlashAttention 3, deterministic",
    "flash": "PyTorch's FlashAttention 2, deterministic backward",
    "efficient": "PyTorch's memory-efficient attention, deterministic",
    "reference": "reference attention",
}

TRITON_WIDEST = 128
"""Widest head whose backward pass fits the registers of our kernels"""

CAUSAL_FROM_BOTTOM_RIGHT = 2
"""`custom_mask_type` of PyTorch's memory-efficient kernel"""


def ragged_attention(
    q_TND: Tensor,
    k_TMD: Tensor,
    v_TMD: Tensor,
    segments: RaggedSegments,
    *,
    scale: float,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """q (T, N, D), k and v (T, M, D), N a multiple of M -> (T, N, D)."""
    if window is not None and window >= segments.longest_keys:
        window = None
    if segments.keys is not None:
        k_TMD, v_TMD = (_GatherKeys.apply(x, segments) for x in (k_TMD, v_TMD))
    kernel = attention_kernel(q_TND.device, q_TND.dtype, q_TND.shape[2], dropout=dropout_p > 0)
    arguments = (q_TND, k_TMD, v_TMD, segments, scale, window, dropout_p)
    if kernel == "flash3":
        return _flash3(*arguments)
    if kernel == "flash":
        return _Flash.apply(*arguments)
    if kernel == "efficient":
        repeats = q_TND.shape[1] // k_TMD.shape[1]
        k_KND, v_KND = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k_TMD, v_TMD))
        if window is not None and segments.keys is not None:
            return _efficient_from_the_first_key(q_TND, k_KND, v_KND, segments, scale, window, dropout_p)
        return _Efficient.apply(q_TND, k_KND, v_KND, *arguments[3:])
    return ragged_attention_reference(*arguments)


def _efficient_from_the_first_key(
    q_TND: Tensor, k_KND: Tensor, v_KND: Tensor, segments: RaggedSegments, scale: float, window: int, dropout_p: float
) -> Tensor:
    """A query for every key, one of which is read per token. In a segment with fewer queries than keys, the backward
    pass of PyTorch's kernel (up to 2.13 at least) counts the window from the first key, the forward pass from the
    last."""
    assert segments.places is not None
    assert segments.place_ends is not None
    whole = replace(segments, query_ends=segments.key_ends, longest_queries=segments.longest_keys)
    y_KND = _Efficient.apply(_GatherKeys.apply(q_TND, segments), k_KND, v_KND, whole, scale, window, dropout_p)
    # a token is a query at its first place
    return y_KND.index_select(0, segments.places.index_select(0, segments.place_ends[:-1]))


def ragged_attention_reference(
    q_TND: Tensor,
    k_KMD: Tensor,
    v_KMD: Tensor,
    segments: RaggedSegments,
    scale: float,
    window: int | None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The kernels' result, segment by segment in plain PyTorch, for gathered keys."""
    repeats = q_TND.shape[1] // k_KMD.shape[1]
    query_ends, key_ends = segments.query_ends.tolist(), segments.key_ends.tolist()
    outputs = []
    for start, end, key_start, key_end in zip(query_ends, query_ends[1:], key_ends, key_ends[1:], strict=False):
        k_NkD, v_NkD = (x[key_start:key_end].repeat_interleave(repeats, 1).transpose(0, 1) for x in (k_KMD, v_KMD))
        queries, keys = end - start, key_end - key_start
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        scores = q_TND[start:end].transpose(0, 1) @ k_NkD.transpose(1, 2) * scale
        weights = scores.masked_fill(~seen.to(scores.device), float("-inf")).softmax(-1)
        outputs.append((torch.dropout(weights, dropout_p, train=True) @ v_NkD).transpose(0, 1))
    return torch.cat(outputs)


@cache
def attention_kernel(device: torch.device, dtype: torch.dtype, width: int, *, dropout: bool = False) -> Kernel:
    """The kernel for heads of this dtype and width on a device; cached, because installed packages do not change."""
    if device.type == "cpu":
        return "reference"
    capability = torch.cuda.get_device_capability(device)
    half = dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and capability >= (8, 0)
    hopper = half and width <= 128 and capability == (9, 0) and not dropout
    if hopper and _flash3_function() is not None and _repeats_its_bits(device, dtype, width):
        return "flash3"
    if half and width <= 256 and torch.backends.cuda.is_flash_attention_available():
        return "flash"
    return "efficient"


class _Flash(torch.autograd.Function):
    """The operators behind torch.nn.attention.varlen. The wrapper's arguments change between versions (2.11 added
    windows, 2.12 grouped heads); those of the operators are the same from 2.11 to 2.13 at least."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: RaggedSegments,
        scale: float,
        window: int | None,
        drop: float,
    ) -> Tensor:
        band = {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
        place = (segments.query_ends, segments.key_ends, segments.longest_queries, segments.longest_keys)
        y, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *place, drop, window is None, False, scale=scale, **band
        )
        ctx.save_for_backward(q, k, v, y, lse, seed, offset)
        ctx.place, ctx.options = place, (drop, window is None, {"scale": scale, **band})
        ctx.segments, ctx.window = segments, window
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse, seed, offset = ctx.saved_tensors
        drop, causal, options = ctx.options
        # AMD's kernels use another layout for lse
        if not drop and dy.shape[2] <= TRITON_WIDEST and use_triton(dy, "auto") and torch.version.hip is None:
            from ft_dist_kernels.attention.ragged_backward_kernels import launch_backward

            gradients = launch_backward(dy, q, k, v, y, lse, ctx.segments, scale=options["scale"], window=ctx.window)
        else:
            with _deterministic():
                gradients = torch.ops.aten._flash_attention_backward(
                    dy, q, k, v, y, lse, *ctx.place, drop, causal, seed, offset, **options
                )
        return (*gradients, None, None, None, None)


class _Efficient(torch.autograd.Function):
    """Needs as many key heads as query heads. Deterministic if keys are not split between blocks."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: RaggedSegments,
        scale: float,
        window: int | None,
        drop: float,
    ) -> Tensor:
        place = (segments.query_ends, segments.key_ends, segments.longest_queries, segments.longest_keys)
        options = {"scale": scale} if window is None else {"scale": scale, "window_size": window}
        y, lse, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
            *(x.unsqueeze(0) for x in (q, k, v)), None, *place, drop, CAUSAL_FROM_BOTTOM_RIGHT, True, **options
        )
        ctx.save_for_backward(q, k, v, y, lse, seed, offset)
        ctx.place, ctx.drop, ctx.options = place, drop, options
        return y.squeeze(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse, seed, offset = ctx.saved_tensors
        gradients = torch.ops.aten._efficient_attention_backward(
            *(x.unsqueeze(0) for x in (dy, q, k, v)), None, y, *ctx.place, lse, ctx.drop, seed, offset,
            CAUSAL_FROM_BOTTOM_RIGHT, False, num_splits_key=1, **ctx.options,
        )  # fmt: skip
        return (*(grad.squeeze(0) for grad in gradients[:3]), None, None, None, None)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Sets PyTorch's determinism flag for one call on this thread. `warn_only` would not affect the flash backward;
    memory is not filled first. `torch.use_deterministic_algorithms` would load torch's compiler, and left on it would
    make every matrix product require a cuBLAS setting."""
    before = torch._C._get_deterministic_algorithms(), torch._C._get_deterministic_algorithms_warn_only()
    filled = torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch._C._set_deterministic_fill_uninitialized_memory(filled)


@cache
def _flash3_function() -> Any:
    """`flash_attn_varlen_func` of the FlashAttention 3 package, or None."""
    if find_spec("flash_attn_interface") is None:
        return None
    from flash_attn_interface import flash_attn_varlen_func

    known = inspect.signature(flash_attn_varlen_func).parameters
    return flash_attn_varlen_func if "deterministic" in known else None


def _flash3(
    q: Tensor, k: Tensor, v: Tensor, segments: RaggedSegments, scale: float, window: int | None, drop: float
) -> Tensor:
    y = _flash3_function()(
        q,
        k,
        v,
        segments.query_ends,
        segments.key_ends,
        max_seqlen_q=segments.longest_queries,
        max_seqlen_k=segments.longest_keys,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=True,
    )
    return y[0] if isinstance(y, tuple) else y


def _repeats_its_bits(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether three backward passes of FlashAttention 3 over 4,096 tokens give the same bits: atomics do not."""
    ends = torch.tensor([0, 4096], dtype=torch.int32, device=device)
    segments = RaggedSegments(ends, ends, 4096, 4096)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dy = (
        torch.randn(4096, heads, width, device=device, generator=generator).to(dtype) for heads in (16, 4, 4, 16)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        runs = [torch.autograd.grad(_flash3(q, k, v, segments, width**-0.5, None, 0.0), inputs, dy) for _ in range(3)]
    return all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


class _GatherKeys(torch.autograd.Function):
    """Tokens (T, M, D) -> places of keys (K, M, D); the gradient of a token is the sum over its places."""

    @staticmethod
    def forward(ctx: Any, x_TMD: Tensor, segments: RaggedSegments) -> Tensor:
        ctx.segments = segments
        return x_TMD.index_select(0, segments.keys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_KMD: Tensor) -> tuple[Tensor, None]:
        return sum_places(grad_KMD, ctx.segments), None


def sum_places(x_KMD: Tensor, segments: RaggedSegments, *, backend: Any = "auto") -> Tensor:
    """(K, M, D) -> (T, M, D): the sum over the places of each token, in fp32 and in their order. Places
    without a token are not read: kernels leave them uninitialised."""
    assert segments.places is not None
    assert segments.place_ends is not None
    if use_triton(x_KMD, backend):
        from ft_dist_kernels.attention.ragged_kernels import launch_sum_places

        return launch_sum_places(x_KMD, segments.places, segments.place_ends)
    return sum_places_reference(x_KMD, segments.places, segments.place_ends)


def sum_places_reference(x_KMD: Tensor, places: Tensor, place_ends: Tensor) -> Tensor:
    counts = place_ends.diff().long()
    token_of = torch.repeat_interleave(torch.arange(len(counts), device=x_KMD.device), counts)
    sums = x_KMD.new_zeros(len(counts), *x_KMD.shape[1:], dtype=torch.promote_types(x_KMD.dtype, torch.float32))
    values = x_KMD.index_select(0, places[: len(token_of)].long()).to(sums.dtype)
    if x_KMD.device.type == "cpu":
        sums.index_add_(0, token_of, values)
    else:  # index_add_ would be atomic here
        sums.index_put_((token_of,), values, accumulate=True)
    return sums.to(x_KMD.dtype)
