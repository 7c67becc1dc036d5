"""Rotary position embedding of queries and keys in one pass, in the half-split layout of transformers.

With x1, x2 the two halves of the rotated part of a head, and c, s the tables (each of two halves as well):

    y1 = x1 c1 - x2 s1        y2 = x2 c2 + x1 s2

Columns past the rotated part (partial rotary: Phi, StableLM) pass through. Backward is the transpose, a rotation by
minus the angle: dx1 = dy1 c1 + dy2 s2, dx2 = dy2 c2 - dy1 s1. Only the tables are saved, and q, k and
upstream gradients are never overwritten: they may be views of a projection, or shared.

The Triton kernel computes in fp32 and rounds once; the CPU form rounds each of its two steps. Results keep the memory
order of q and k: if they are transposed views, the heads of a position stay adjacent, so the projection's backward
needs no copy.

Shapes: B batch, N heads, S positions, D head width, R rotated columns (even, <= D).
Source: Su et al. (arXiv 2104.09864).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.backend import Backend, use_triton
from ft_dist_kernels.rope.scaling import rope_inv_freq
from ft_dist_kernels.tiles import tiles

__all__ = ["rope", "rope_inv_freq", "rope_merged", "rope_reference", "rope_tables"]


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """q (B, N, S, D) and k (B, N_kv, S, D), with any strides, rotated by tables cos and sin (B or 1, S, R).

    The same numbers as transformers' apply_rotary_pos_emb(q, k, cos, sin). The tables have no gradient. If their
    dtype differs from that of q and k, the CPU form rounds them, as transformers does, and Triton uses them unchanged.
    """
    _check(q, k, cos, sin)
    return _run(q, k, cos.detach(), sin.detach(), use_triton(q, backend))


def rope_merged(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, heads: int, kv_heads: int, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, N, S, D), k and v (B, N_kv, S, D) of qkv (B, S, (N + 2 N_kv) D), q and k rotated as by `rope`.

    They are views of one new tensor, so qkv need not be kept; the gradient of qkv is one tensor too, for a projection
    that computes all three. Raises ValueError as `rope`, and for a width that the heads do not divide.
    """
    whole = heads + 2 * kv_heads
    if qkv.dim() != 3 or heads < 1 or kv_heads < 1 or qkv.shape[2] % whole:
        raise ValueError(f"qkv {tuple(qkv.shape)} must be (B, S, ({heads} + 2 x {kv_heads}) D), heads at least 1.")
    q, k, _ = _split_heads(qkv, heads, kv_heads)
    _check(q, k, cos, sin)
    return _run_merged(qkv, cos.detach(), sin.detach(), heads, kv_heads, use_triton(qkv, backend))


def rope_tables(
    position_ids: Tensor,
    inv_freq: Tensor,
    *,
    attention_scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin (..., S, R) of position_ids (..., S) and inv_freq (R / 2,); angles are fp32 even under autocast."""
    angles = position_ids[..., None].float() * inv_freq.to(device=position_ids.device, dtype=torch.float32)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * attention_scaling).to(dtype), (angles.sin() * attention_scaling).to(dtype)


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    cos, sin = cos.to(q.dtype).unsqueeze(1), sin.to(q.dtype).unsqueeze(1)
    rotated = cos.shape[-1]

    def embed(x: Tensor) -> Tensor:
        turning, passing = x[..., :rotated], x[..., rotated:]
        first, second = turning.chunk(2, -1)
        return torch.cat((turning * cos + torch.cat((-second, first), -1) * sin, passing), -1)

    return embed(q), embed(k)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError naming the value, the rule and the fix."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or k.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype} and k {k.dtype}; both must be one of fp32, bf16, fp16.")
    same = q.dim() == k.dim() == 4 and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
    if not same:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, N, S, D) and (B, N_kv, S, D) with the same B, S, D."
        )
    batch, _, positions, width = q.shape
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != positions:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be ({batch} or 1, {positions}, R) for q "
            f"{tuple(q.shape)}."
        )
    if cos.shape[2] % 2 or not 0 < cos.shape[2] <= width:
        raise ValueError(f"cos has {cos.shape[2]} columns; the rotated part must be even and within 2..{width}.")


@torch._disable_dynamo
def _run_merged(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _RopeMerged.apply(*arguments)


def _split_heads(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, S, D), (B, N_kv, S, D) twice: views of (B, S, (N + 2 N_kv) D)."""
    by_head = qkv.unflatten(2, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    q, k, v = by_head.split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


@torch._disable_dynamo
def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _Rope.apply(*arguments)


def _positions_first(x: Tensor) -> bool:
    """Whether the memory layout is (B, S, N, D)."""
    return x.stride(1) < x.stride(2)


def _empty(x: Tensor, positions_first: bool) -> Tensor:
    batch, heads, positions, width = x.shape
    if positions_first:
        return torch.empty(batch, positions, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)
    return torch.empty(batch, heads, positions, width, dtype=x.dtype, device=x.device)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.orders, ctx.triton = (_positions_first(q), _positions_first(k)), triton
        return _rotate(q, k, cos, sin, ctx.orders, inverse=False, triton=triton)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_rotate(dq, dk, cos, sin, ctx.orders, inverse=True, triton=ctx.triton), None, None, None


class _RopeMerged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, triton: bool
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.shape, ctx.heads, ctx.triton = qkv.shape, (heads, kv_heads), triton
        turned = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        return _rotate_merged(_split_heads(qkv, heads, kv_heads), turned, cos, sin, ctx.heads, triton, inverse=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dqkv = torch.empty(ctx.shape, dtype=upstream[0].dtype, device=upstream[0].device)
        _rotate_merged(upstream, dqkv, cos, sin, ctx.heads, ctx.triton, inverse=True)
        return dqkv, *[None] * 5


def _rotate_merged(
    parts: Sequence[Tensor],
    into: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int],
    triton: bool,
    *,
    inverse: bool,
) -> tuple[Tensor, ...]:
    """The views of q, k and v in `into`, filled."""
    outputs = _split_heads(into, *heads)
    if triton:
        _triton_kernels().rotate_triton(parts, cos, sin, outputs, inverse)
        return outputs
    for x, y in zip(parts[:2], outputs[:2], strict=True):
        rotate_torch(x, cos, sin, y, inverse)
    outputs[2].copy_(parts[2])
    return outputs


def _rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    orders: tuple[bool, bool],
    *,
    inverse: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _empty(q, orders[0]), _empty(k, orders[1])
    if triton:
        _triton_kernels().rotate_triton((q, k), cos, sin, (q_out, k_out), inverse)
    else:
        for x, y in ((q, q_out), (k, k_out)):
            rotate_torch(x, cos, sin, y, inverse)
    return q_out, k_out


def rotate_torch(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, inverse: bool) -> None:
    batch, heads, _, width = x.shape
    rotated, half = cos.shape[-1], cos.shape[-1] // 2
    if rotated < width:
        y[..., rotated:].copy_(x[..., rotated:])
        x, y = x[..., :rotated], y[..., :rotated]
    for x_t, y_t, c, s in tiles(
        batch * heads * rotated, x, y, cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None], dim=2
    ):
        x1, x2 = x_t.split(half, -1)
        y1, y2 = torch.mul(x_t, c, out=y_t).split(half, -1)
        s1, s2 = s.split(half, -1)
        y1.addcmul_(x2, s2 if inverse else s1, value=1 if inverse else -1)
        y2.addcmul_(x1, s1 if inverse else s2, value=-1 if inverse else 1)


def _triton_kernels() -> Any:
    from ft_dist_kernels.rope import kernels as rope_kernels

    return rope_kernels


def aot_cases(chip: Chip) -> list[AotCase]:
    """Llama-3-8B (32 and 8 heads of 128), Gemma 3 (8 and 4 of 256), Phi-style partial rotary (24 and 8, 96 of 128)."""
    return _triton_kernels().aot_cases(chip)
