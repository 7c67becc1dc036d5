"""The small products of `lora_linear` in Triton; the vendor's GEMM computes the large frozen ones.

    down_kernel           S = alpha (X * M) A^T of up to three members from one read of X, masks computed on the fly
    up_backward_kernel    dY B and dB = dY^T S of all members from one read of each dY
    down_backward_kernel  sum over members of M * (dS A), every dA = dS^T (X * M): one read of X, one hash for both

Long sums are split over programs, each of which writes its own partial sum; `sum_ranks_kernel` (S, dS) and
`sum_gradients_kernel` (dA, dB) add them in a fixed order, for all members at once. Traffic in bf16, T x I input and
T x O output: down reads 2TI bytes, up_backward 2TO plus partial sums, down_backward reads and writes 2TI.

Shapes: T tokens, I in, O out, R rank (padded to a power of two >= 16 on chip), S concatenated ranks of a group.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself; only constants have one.

import triton
import triton.language as tl

from ft_dist_kernels.dropout.kernels import keep_tile, row_keys


@triton.jit
def _down_step(
    acc, x_ti, a, rank, first, in_features, k0, k1, limit, RP: tl.constexpr, DROPOUT: tl.constexpr, P: tl.constexpr
):
    BLOCK_I: tl.constexpr = x_ti.shape[1]
    ranks = tl.arange(0, RP)
    columns = first + tl.arange(0, BLOCK_I)
    a_ri = tl.load(
        a + ranks[:, None].to(tl.int64) * in_features + columns[None, :],
        mask=(ranks[:, None] < rank) & (columns[None, :] < in_features),
        other=0.0,
    )
    if DROPOUT:
        x_ti = tl.where(keep_tile(k0, k1, first, limit, BLOCK_I), x_ti, 0.0)
    return tl.dot(x_ti, tl.trans(a_ri), acc, input_precision=P)


@triton.jit
def _store_ranks(s, acc, rows, T, first, rank, stride_s, alpha, RP: tl.constexpr):
    ranks = tl.arange(0, RP)
    tl.store(
        s + rows[:, None] * stride_s + first + ranks[None, :],
        (acc * alpha).to(s.dtype.element_ty),
        mask=(rows[:, None] < T) & (ranks[None, :] < rank),
    )


@triton.jit
def down_tile(
    block, x, a0, a1, a2, s, T, in_features, R0, R1, R2, stride_x, stride_s,
    alpha0, alpha1, alpha2, seed0, seed1, seed2, limit0, limit1, limit2, columns_per_split,
    N: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
    DROPOUT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A block of rows of S, or its partial sum over one run of X's columns."""
    split = tl.program_id(1)
    rows = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    key00, key01 = row_keys(rows, seed0)
    key10, key11 = row_keys(rows, seed1)
    key20, key21 = row_keys(rows, seed2)
    acc0 = tl.zeros((BLOCK_T, RP), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_T, RP), dtype=tl.float32)
    acc2 = tl.zeros((BLOCK_T, RP), dtype=tl.float32)
    begin = split * columns_per_split
    for first in range(begin, tl.minimum(begin + columns_per_split, in_features), BLOCK_I):
        columns = first + tl.arange(0, BLOCK_I)
        x_ti = tl.load(
            x + rows[:, None] * stride_x + columns[None, :],
            mask=(rows[:, None] < T) & (columns[None, :] < in_features),
            other=0.0,
        )
        acc0 = _down_step(acc0, x_ti, a0, R0, first, in_features, key00, key01, limit0, RP, DROPOUT, P)
        if N > 1:
            acc1 = _down_step(acc1, x_ti, a1, R1, first, in_features, key10, key11, limit1, RP, DROPOUT, P)
        if N > 2:
            acc2 = _down_step(acc2, x_ti, a2, R2, first, in_features, key20, key21, limit2, RP, DROPOUT, P)
    s += split.to(tl.int64) * T * stride_s
    _store_ranks(s, acc0, rows, T, 0, R0, stride_s, alpha0, RP)
    if N > 1:
        _store_ranks(s, acc1, rows, T, R0, R1, stride_s, alpha1, RP)
    if N > 2:
        _store_ranks(s, acc2, rows, T, R0 + R1, R2, stride_s, alpha2, RP)


@triton.jit(do_not_specialize=["T", "seed0", "seed1", "seed2", "limit0", "limit1", "limit2"])
def down_kernel(
    x, a0, a1, a2, s, T, in_features, R0, R1, R2, stride_x, stride_s,
    alpha0, alpha1, alpha2, seed0, seed1, seed2, limit0, limit1, limit2, columns_per_split,
    N: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
    DROPOUT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    down_tile(
        tl.program_id(0), x, a0, a1, a2, s, T, in_features, R0, R1, R2, stride_x, stride_s,
        alpha0, alpha1, alpha2, seed0, seed1, seed2, limit0, limit1, limit2, columns_per_split,
        N, RP, BLOCK_T, BLOCK_I, DROPOUT, P,
    )  # fmt: skip


@triton.jit
def pick(block, end0, end1, value0, value1, value2, N: tl.constexpr):
    """The value of the member that owns a block: blocks before `end0` are the first's, before `end1` the second's."""
    value = value0
    if N > 1:
        value = tl.where(block < end0, value0, value1)
    if N > 2:
        value = tl.where(block < end1, value, value2)
    return value


# Whether O is a multiple of 16 decides how wide dY is loaded
@triton.jit(do_not_specialize=["T", "rows_per_split"])
def up_backward_kernel(
    dy0, dy1, dy2, s, b0, b1, b2, ds_parts, db_parts, T, O0, O1, O2, R0, R1, R2, C0, C1, C2,
    stride_dy0, stride_dy1, stride_dy2, stride_s, width, rows_per_split,
    N: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
    NEED_DS: tl.constexpr, NEED_DB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A block of one member's output columns over a run of rows; C is where the member's ranks begin in S."""
    block, split = tl.program_id(0), tl.program_id(1)
    end0 = tl.cdiv(O0, BLOCK_O)
    end1 = end0 + tl.cdiv(O1, BLOCK_O)
    dy = pick(block, end0, end1, dy0, dy1, dy2, N)
    b = pick(block, end0, end1, b0, b1, b2, N)
    out_features = pick(block, end0, end1, O0, O1, O2, N)
    rank = pick(block, end0, end1, R0, R1, R2, N)
    first_rank = pick(block, end0, end1, C0, C1, C2, N)
    stride_dy = pick(block, end0, end1, stride_dy0, stride_dy1, stride_dy2, N)
    begin = pick(block, end0, end1, 0, O0 * R0, O0 * R0 + O1 * R1, N)
    block -= pick(block, end0, end1, 0, end0, end1, N)

    columns = block * BLOCK_O + tl.arange(0, BLOCK_O)
    ranks = tl.arange(0, RP)
    own = (columns[:, None] < out_features) & (ranks[None, :] < rank)
    b_or = tl.load(b + columns[:, None].to(tl.int64) * rank + ranks[None, :], mask=own, other=0.0)
    acc = tl.zeros((BLOCK_O, RP), dtype=tl.float32)
    for offset in range(0, rows_per_split, BLOCK_T):
        rows = split.to(tl.int64) * rows_per_split + offset + tl.arange(0, BLOCK_T)
        dy_to = tl.load(
            dy + rows[:, None] * stride_dy + columns[None, :],
            mask=(rows[:, None] < T) & (columns[None, :] < out_features),
            other=0.0,
        )
        in_ranks = (rows[:, None] < T) & (ranks[None, :] < rank)
        if NEED_DS:
            ds_tr = tl.dot(dy_to, b_or, input_precision=P)
            at = (block.to(tl.int64) * T + rows[:, None]) * width + first_rank + ranks[None, :]
            tl.store(ds_parts + at, ds_tr, mask=in_ranks)
        if NEED_DB:
            s_tr = tl.load(s + rows[:, None] * stride_s + first_rank + ranks[None, :], mask=in_ranks, other=0.0)
            acc = tl.dot(tl.trans(dy_to), s_tr, acc, input_precision=P)
    if NEED_DB:
        numel = O0 * R0 + O1 * R1 + O2 * R2
        at = split.to(tl.int64) * numel + begin + columns[:, None].to(tl.int64) * rank + ranks[None, :]
        tl.store(db_parts + at, acc, mask=own)


@triton.jit
def _input_step(
    acc, dx_ti, x_ti, a_ri, ds, rows, T, first_rank, rank, stride_ds, first, k0, k1, limit,
    RP: tl.constexpr, DROPOUT: tl.constexpr, NEED_DX: tl.constexpr, NEED_DA: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    ranks = tl.arange(0, RP)
    ds_tr = tl.load(
        ds + rows[:, None] * stride_ds + first_rank + ranks[None, :],
        mask=(rows[:, None] < T) & (ranks[None, :] < rank),
        other=0.0,
    )
    BLOCK_I: tl.constexpr = a_ri.shape[1]
    if NEED_DX:
        part = tl.dot(ds_tr, a_ri, input_precision=P)
    if DROPOUT:
        keep = keep_tile(k0, k1, first, limit, BLOCK_I)
        if NEED_DX:
            part = tl.where(keep, part, 0.0)
        if NEED_DA:
            x_ti = tl.where(keep, x_ti, 0.0)
    if NEED_DX:
        dx_ti += part
    if NEED_DA:
        acc = tl.dot(tl.trans(ds_tr), x_ti, acc, input_precision=P)
    return acc, dx_ti


@triton.jit
def _load_a(a, rank, columns, in_features, RP: tl.constexpr):
    ranks = tl.arange(0, RP)
    return tl.load(
        a + ranks[:, None].to(tl.int64) * in_features + columns[None, :],
        mask=(ranks[:, None] < rank) & (columns[None, :] < in_features),
        other=0.0,
    )


@triton.jit
def _store_a(parts, acc, split, first_rank, rank, width, columns, in_features, RP: tl.constexpr):
    ranks = tl.arange(0, RP)
    tl.store(
        parts + (split.to(tl.int64) * width + first_rank + ranks[:, None]) * in_features + columns[None, :],
        acc,
        mask=(ranks[:, None] < rank) & (columns[None, :] < in_features),
    )


@triton.jit(do_not_specialize=["T", "rows_per_split", "seed0", "seed1", "seed2", "limit0", "limit1", "limit2"])
def down_backward_kernel(
    x, ds, a0, a1, a2, dx, da_parts, T, in_features, R0, R1, R2, stride_x, stride_ds, rows_per_split,
    seed0, seed1, seed2, limit0, limit1, limit2,
    N: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
    DROPOUT: tl.constexpr, NEED_DX: tl.constexpr, NEED_DA: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_I
    split = tl.program_id(1)
    columns = first + tl.arange(0, BLOCK_I)
    a0_ri = _load_a(a0, R0, columns, in_features, RP)
    a1_ri = a0_ri
    a2_ri = a0_ri
    if N > 1:
        a1_ri = _load_a(a1, R1, columns, in_features, RP)
    if N > 2:
        a2_ri = _load_a(a2, R2, columns, in_features, RP)
    acc0 = tl.zeros((RP, BLOCK_I), dtype=tl.float32)
    acc1 = tl.zeros((RP, BLOCK_I), dtype=tl.float32)
    acc2 = tl.zeros((RP, BLOCK_I), dtype=tl.float32)
    for offset in range(0, rows_per_split, BLOCK_T):
        rows = split.to(tl.int64) * rows_per_split + offset + tl.arange(0, BLOCK_T)
        inside = (rows[:, None] < T) & (columns[None, :] < in_features)
        x_ti = tl.load(x + rows[:, None] * stride_x + columns[None, :], mask=inside, other=0.0)
        dx_ti = tl.zeros((BLOCK_T, BLOCK_I), dtype=tl.float32)
        k0, k1 = row_keys(rows, seed0)
        acc0, dx_ti = _input_step(
            acc0, dx_ti, x_ti, a0_ri, ds, rows, T, 0, R0, stride_ds, first, k0, k1, limit0,
            RP, DROPOUT, NEED_DX, NEED_DA, P,
        )  # fmt: skip
        if N > 1:
            k0, k1 = row_keys(rows, seed1)
            acc1, dx_ti = _input_step(
                acc1, dx_ti, x_ti, a1_ri, ds, rows, T, R0, R1, stride_ds, first, k0, k1, limit1,
                RP, DROPOUT, NEED_DX, NEED_DA, P,
            )  # fmt: skip
        if N > 2:
            k0, k1 = row_keys(rows, seed2)
            acc2, dx_ti = _input_step(
                acc2, dx_ti, x_ti, a2_ri, ds, rows, T, R0 + R1, R2, stride_ds, first, k0, k1, limit2,
                RP, DROPOUT, NEED_DX, NEED_DA, P,
            )  # fmt: skip
        if NEED_DX:
            tl.store(dx + rows[:, None] * in_features + columns[None, :], dx_ti.to(dx.dtype.element_ty), mask=inside)
    if NEED_DA:
        width = R0 + R1 + R2
        _store_a(da_parts, acc0, split, 0, R0, width, columns, in_features, RP)
        if N > 1:
            _store_a(da_parts, acc1, split, R0, R1, width, columns, in_features, RP)
        if N > 2:
            _store_a(da_parts, acc2, split, R0 + R1, R2, width, columns, in_features, RP)


@triton.jit(do_not_specialize=["T", "count0", "count1", "count2"])
def sum_ranks_kernel(
    parts, out, T, width, out_width, stride_out, R0, R1, R2, C0, C1, C2, count0, count1, count2, alpha0, alpha1, alpha2,
    WP: tl.constexpr, BLOCK_T: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[t, c] = alpha times the sum of parts[:count, t, c], first to last; zero in unused columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, WP)
    first, second, third = _owns(column, C0, R0), _owns(column, C1, R1), _owns(column, C2, R2)
    count = tl.where(first, count0, tl.where(second, count1, tl.where(third, count2, 0)))
    alpha = tl.where(first, alpha0, tl.where(second, alpha1, tl.where(third, alpha2, 0.0)))
    at = rows[:, None] * width + column[None, :]
    inside = rows[:, None] < T
    total = tl.zeros((BLOCK_T, WP), dtype=tl.float32)
    for part in range(0, tl.maximum(count0, tl.maximum(count1, count2)), DEPTH):
        for ahead in tl.static_range(DEPTH):
            total += tl.load(parts + at, mask=inside & (part + ahead < count)[None, :], other=0.0)
            at += tl.cast(T, tl.int64) * width
    total = (total * alpha).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * stride_out + column[None, :], total, mask=inside & (column[None, :] < out_width))


@triton.jit
def _owns(column, first, count):
    return (column >= first) & (column < first + count)


@triton.jit
def _sum_parts(block, parts, out, numel, splits, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    parts += index
    for split in range(0, splits, DEPTH):
        for ahead in tl.static_range(DEPTH):
            left = tl.where(split + ahead < splits, numel, 0)
            total += tl.load(parts, mask=index < left, other=0.0)
            parts += numel
    tl.store(out + index, total.to(out.dtype.element_ty), mask=index < numel)


@triton.jit(do_not_specialize=["a_splits", "b_splits", "a_blocks"])
def sum_gradients_kernel(
    a_parts, b_parts, da, db, a_numel, b_numel, a_splits, b_splits, a_blocks, BLOCK: tl.constexpr, DEPTH: tl.constexpr
):
    """dA and dB, each the sum of its partial sums, first to last."""
    block = tl.program_id(0)
    if block < a_blocks:
        _sum_parts(block, a_parts, da, a_numel, a_splits, BLOCK, DEPTH)
    else:
        _sum_parts(block - a_blocks, b_parts, db, b_numel, b_splits, BLOCK, DEPTH)
