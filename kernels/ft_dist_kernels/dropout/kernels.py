"""The dropout hash in Triton, for kernels that mask a tile on chip: the same bits as the PyTorch form.

Shapes: T rows of the tile, C columns (contiguous, starting at an even column).
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of kernels itself; only constants have one.

import triton
import triton.language as tl


@triton.jit
def row_keys(rows_T, seed):
    """(k0, k1) uint32 (T,) of int64 row indices; `seed` is `mix_seed` of the user's."""
    z = rows_T.to(tl.uint64) * 0x9E3779B97F4A7C15 + seed.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def keep_tile(k0_T, k1_T, first_column, limit, COLUMNS: tl.constexpr):
    """bool (T, COLUMNS): True where kept. One hash serves an even column and the odd one after it."""
    pair = (first_column // 2 + tl.arange(0, COLUMNS // 2)).to(tl.uint32)
    h = (pair * 0x9E3779B9)[None, :] ^ k0_T[:, None]
    h = ((h ^ (h >> 16)) * 0x7FEB352D) ^ k1_T[:, None]
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    draw = tl.interleave(h & 0x7FFF, (h >> 16) & 0x7FFF)
    return draw.to(tl.int32) >= limit
