"""The backward pass of attention over ragged segments in Triton (see `ragged.py`).

    P = exp(scale Q K^T - lse)    dV = P^T dY    dS = P * (dY V^T - delta)    dQ = scale dS K    dK = scale dS^T Q

with delta = sum(dY * Y) per query and head, after FlashAttention 2 (arXiv 2307.08691). Two passes: one computes dK and
dV with one block of keys per program, the other dQ with one block of queries per program. A single program accumulates
each element in a fixed order, so the result is deterministic without atomics, partial sums of dQ in memory, or copies
of keys for the heads that share them. This takes seven products where FlashAttention takes five.

Shapes: T tokens, K places of keys, N heads, M key heads, D head width.
"""

# mypy: disallow-incomplete-defs=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.attention.ragged_segments import RaggedSegments
from ft_dist_kernels.chips import chip_of

LOG2_E = tl.constexpr(1.4426950408889634)
ROWS = 32
"""Rows per program that computes delta"""

# per pass: rows of the block that a program keeps, rows of the blocks that it loops over, warps, stages
TILES: dict[Chip, tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    "sm_80": ((64, 32, 8, 2), (64, 32, 4, 2)),
    "sm_90": ((128, 32, 8, 2), (128, 64, 8, 2)),
    "sm_100": ((128, 32, 8, 2), (128, 64, 8, 2)),
    "gfx942": ((64, 32, 4, 1), (64, 32, 4, 1)),
}


@triton.jit
def _tile(pointer, first, stride, rows, count, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, BLOCK_D) from row `first`; `rows` are row numbers within the segment; zero from `count` on."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < count)[:, None]
    if D < BLOCK_D:
        inside = inside & (columns < D)
    at = pointer + tl.cast(first, tl.int64) * stride
    return tl.load(at + (tl.arange(0, ROWS)[:, None] * stride + columns), mask=inside, other=0.0)


@triton.jit
def delta_kernel(
    y_ptr, dy_ptr, delta_ptr, tokens, y_t, y_n, dy_t, dy_n, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    y = _tile(y_ptr + head * y_n, first, y_t, rows, tokens, D, ROWS, BLOCK_D).to(tl.float32)
    dy = _tile(dy_ptr + head * dy_n, first, dy_t, rows, tokens, D, ROWS, BLOCK_D).to(tl.float32)
    tl.store(delta_ptr + head * tokens + rows, tl.sum(y * dy, 1), mask=rows < tokens)


@triton.jit
def _queries_past(
    dk, dv, k, v, q_ptr, dy_ptr, lse_ptr, delta_ptr, tokens, q_t, q_n, dy_t, dy_n, first, last, count,
    shift, keys, scale, window, MASKED: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Accumulate blocks of queries from `first` up to `last`, head by head: nested loops would use more registers.
    Queries from `count` on are zero and add nothing."""
    blocks = tl.cdiv(tl.maximum(last - first, 0), QUERIES)
    for number in range(GROUP * blocks):
        member, start = number // blocks, first + number % blocks * QUERIES
        queries = start + tl.arange(0, QUERIES)
        q = _tile(q_ptr + member * q_n, start, q_t, queries, count, D, QUERIES, BLOCK_D)
        dy = _tile(dy_ptr + member * dy_n, start, dy_t, queries, count, D, QUERIES, BLOCK_D)
        lse = tl.load(lse_ptr + member * tokens + queries, mask=queries < count, other=0.0)
        delta = tl.load(delta_ptr + member * tokens + queries, mask=queries < count, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        weights = tl.exp2(scores * (scale * LOG2_E) - lse[None, :] * LOG2_E)
        if MASKED:
            distance = queries[None, :] + shift - keys[:, None]
            seen = distance >= 0
            if WINDOW:
                seen = seen & (distance < window)
            weights = tl.where(seen, weights, 0.0)
        dv += tl.dot(weights.to(dy.dtype), dy, input_precision="ieee")
        d_weights = tl.dot(v, tl.trans(dy), input_precision="ieee")
        d_scores = weights * (d_weights - delta[None, :])
        dk += tl.dot(d_scores.to(q.dtype), q, input_precision="ieee")
    return dk, dv


@triton.jit
def keys_backward_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, query_ends_ptr, key_ends_ptr, tokens,
    q_t, q_n, k_t, k_n, v_t, v_n, dy_t, dy_n, dk_t, dk_n, dv_t, dv_n, scale, window,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (key heads, segments, blocks of keys): the first block, which most queries attend to, starts first."""
    key_head, segment, begin = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * KEYS
    key_start, query_start = tl.load(key_ends_ptr + segment), tl.load(query_ends_ptr + segment)
    key_count = tl.load(key_ends_ptr + segment + 1) - key_start
    count = tl.load(query_ends_ptr + segment + 1) - query_start
    if begin < key_count:
        shift = key_count - count
        keys, row = begin + tl.arange(0, KEYS), key_start + begin
        k = _tile(k_ptr + key_head * k_n, row, k_t, keys, key_count, D, KEYS, BLOCK_D)
        v = _tile(v_ptr + key_head * v_n, row, v_t, keys, key_count, D, KEYS, BLOCK_D)
        dk = tl.zeros((KEYS, BLOCK_D), dtype=tl.float32)
        dv = tl.zeros((KEYS, BLOCK_D), dtype=tl.float32)
        first = tl.maximum(begin - shift, 0) // QUERIES * QUERIES
        if WINDOW:
            last = tl.minimum(count, begin + KEYS - 1 + window - shift)
        else:  # from here on queries attend to the whole block
            last = tl.minimum(count, tl.cdiv(tl.maximum(begin + KEYS - 1 - shift, 0), QUERIES) * QUERIES)
        query_row, head = query_start.to(tl.int64), key_head * GROUP
        q_at, dy_at = q_ptr + query_row * q_t + head * q_n, dy_ptr + query_row * dy_t + head * dy_n
        lse_at, delta_at = lse_ptr + head * tokens + query_row, delta_ptr + head * tokens + query_row
        dk, dv = _queries_past(
            dk, dv, k, v, q_at, dy_at, lse_at, delta_at, tokens, q_t, q_n, dy_t, dy_n, first, last, count,
            shift, keys, scale, window, True, WINDOW, GROUP, D, BLOCK_D, QUERIES,
        )  # fmt: skip
        if not WINDOW:
            dk, dv = _queries_past(
                dk, dv, k, v, q_at, dy_at, lse_at, delta_at, tokens, q_t, q_n, dy_t, dy_n, last, count, count,
                shift, keys, scale, window, False, WINDOW, GROUP, D, BLOCK_D, QUERIES,
            )  # fmt: skip
        columns = tl.arange(0, BLOCK_D)[None, :]
        inside = (keys < key_count)[:, None] & (columns < D)
        at = (key_start + keys).to(tl.int64)[:, None]
        tl.store(dk_ptr + key_head * dk_n + at * dk_t + columns, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + key_head * dv_n + at * dv_t + columns, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _keys_past(
    dq, q, dy, lse, delta, k_ptr, v_ptr, k_t, v_t, first, last, count, positions, scale, window,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Accumulate blocks of keys from `first` up to `last`."""
    for start in range(first, last, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = _tile(k_ptr, start, k_t, keys, count, D, KEYS, BLOCK_D)
        v = _tile(v_ptr, start, v_t, keys, count, D, KEYS, BLOCK_D)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E) - lse[:, None] * LOG2_E)
        if MASKED:
            distance = positions[:, None] - keys[None, :]
            seen = distance >= 0
            if WINDOW:
                seen = seen & (distance < window)
            weights = tl.where(seen, weights, 0.0)
        d_scores = weights * (tl.dot(dy, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq += tl.dot(d_scores.to(k.dtype), k, input_precision="ieee")
    return dq


@triton.jit
def queries_backward_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, dq_ptr, query_ends_ptr, key_ends_ptr, tokens,
    q_t, q_n, k_t, k_n, v_t, v_n, dy_t, dy_n, dq_t, dq_n, scale, window,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (heads, segments, blocks of queries): the last block, which attends to most keys, starts first."""
    head, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = (tl.num_programs(2) - 1 - tl.program_id(2)) * QUERIES
    key_start, query_start = tl.load(key_ends_ptr + segment), tl.load(query_ends_ptr + segment)
    key_count = tl.load(key_ends_ptr + segment + 1) - key_start
    count = tl.load(query_ends_ptr + segment + 1) - query_start
    if begin < count:
        shift = key_count - count
        queries, row = begin + tl.arange(0, QUERIES), query_start + begin
        rows = query_start + queries
        q = _tile(q_ptr + head * q_n, row, q_t, queries, count, D, QUERIES, BLOCK_D)
        dy = _tile(dy_ptr + head * dy_n, row, dy_t, queries, count, D, QUERIES, BLOCK_D)
        lse = tl.load(lse_ptr + head * tokens + rows, mask=queries < count, other=0.0)
        delta = tl.load(delta_ptr + head * tokens + rows, mask=queries < count, other=0.0)
        dq = tl.zeros((QUERIES, BLOCK_D), dtype=tl.float32)
        positions = queries + shift
        last = tl.minimum(begin + QUERIES + shift, key_count)
        k_at = k_ptr + key_start.to(tl.int64) * k_t + head // GROUP * k_n
        v_at = v_ptr + key_start.to(tl.int64) * v_t + head // GROUP * v_n
        if WINDOW:
            first = tl.maximum(begin + shift - window + 1, 0) // KEYS * KEYS
        else:  # up to here the first query attends to whole blocks
            first = (begin + shift + 1) // KEYS * KEYS
            dq = _keys_past(
                dq, q, dy, lse, delta, k_at, v_at, k_t, v_t, 0, first, key_count, positions, scale, window,
                False, WINDOW, D, BLOCK_D, KEYS,
            )  # fmt: skip
        dq = _keys_past(
            dq, q, dy, lse, delta, k_at, v_at, k_t, v_t, first, last, key_count, positions, scale, window,
            True, WINDOW, D, BLOCK_D, KEYS,
        )  # fmt: skip
        columns = tl.arange(0, BLOCK_D)[None, :]
        inside = (queries < count)[:, None] & (columns < D)
        at = rows.to(tl.int64)[:, None]
        tl.store(dq_ptr + head * dq_n + at * dq_t + columns, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


def launch_backward(
    dy_TND: Tensor,
    q_TND: Tensor,
    k_KMD: Tensor,
    v_KMD: Tensor,
    y_TND: Tensor,
    lse_NT: Tensor,
    segments: RaggedSegments,
    *,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (T, N, D), (K, M, D) and (K, M, D); those of places outside segments are uninitialised."""
    tokens, heads, width = q_TND.shape
    key_heads, count = k_KMD.shape[1], len(segments.query_ends) - 1
    q, k, v, y, dy = (x if x.stride(2) == 1 else x.contiguous() for x in (q_TND, k_KMD, v_KMD, y_TND, dy_TND))
    delta_NT = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    block = {"D": width, "BLOCK_D": max(16, triton.next_power_of_2(width))}
    delta_kernel[(triton.cdiv(tokens, ROWS), heads)](
        y, dy, delta_NT, tokens, *y.stride()[:2], *dy.stride()[:2], **block, ROWS=ROWS
    )
    inputs, ends = (q, k, v, dy, lse_NT, delta_NT), (segments.query_ends, segments.key_ends, tokens)
    strides = [stride for x in (q, k, v, dy) for stride in x.stride()[:2]]
    shape = {"GROUP": heads // key_heads, "WINDOW": window is not None, **block}
    of_keys, of_queries = TILES[chip_of(q.device)]
    keys_backward_kernel[(key_heads, count, triton.cdiv(segments.longest_keys, of_keys[0]))](
        *inputs, dk, dv, *ends, *strides, *dk.stride()[:2], *dv.stride()[:2], scale, window or 0,
        **shape, KEYS=of_keys[0], QUERIES=of_keys[1], num_warps=of_keys[2], num_stages=of_keys[3],
    )  # fmt: skip
    queries_backward_kernel[(heads, count, triton.cdiv(segments.longest_queries, of_queries[0]))](
        *inputs, dq, *ends, *strides, *dq.stride()[:2], scale, window or 0,
        **shape, QUERIES=of_queries[0], KEYS=of_queries[1], num_warps=of_queries[2], num_stages=of_queries[3],
    )  # fmt: skip
    return dq, dk, dv


def aot_cases(chip: Chip) -> list[AotCase]:
    """Heads of Llama-3-8B and of SmolLM2, over all earlier tokens and with a window."""
    (keys, queries, *keys_options), (other_queries, other_keys, *queries_options) = TILES[chip]
    cases = [_case("delta", delta_kernel, {"D": 128, "BLOCK_D": 128, "ROWS": ROWS}, [4, 2])]
    for width, group, window in ((128, 4, False), (128, 4, True), (64, 3, False)):
        shape = {"GROUP": group, "WINDOW": window, "D": width, "BLOCK_D": width}
        name = f"{width} wide{', window' if window else ''}"
        tile = {"KEYS": keys, "QUERIES": queries}
        cases.append(_case(f"keys_backward {name}", keys_backward_kernel, shape | tile, keys_options))
        tile = {"QUERIES": other_queries, "KEYS": other_keys}
        cases.append(_case(f"queries_backward {name}", queries_backward_kernel, shape | tile, queries_options))
    return cases


def _case(name: str, kernel: Any, constexprs: dict[str, Any], options: list[int]) -> AotCase:
    special = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "query_ends_ptr": "*i32", "key_ends_ptr": "*i32"}
    signature = {}
    for argument in kernel.arg_names:
        plain = "*bf16" if argument.endswith("_ptr") else "fp32" if argument == "scale" else "i32"
        signature[argument] = "constexpr" if argument in constexprs else special.get(argument, plain)
    divisible = tuple(argument for argument, kind in signature.items() if kind not in ("constexpr", "fp32"))
    return AotCase(
        name, kernel, signature, constexprs, divisible, dict(zip(("num_warps", "num_stages"), options, strict=True))
    )
