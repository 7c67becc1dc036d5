"""Kernels for `__main__.py`: one correct, two with a fault that only a GPU would reveal."""

import triton
import triton.language as tl


@triton.jit
def add_one(x, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + index, tl.load(x + index, index < count, 0.0) + 1.0, index < count)


@triton.jit
def counts_in_64_bits(x, count, BLOCK: tl.constexpr):
    """The compiler turns an argument equal to 1 into a constant, and a constant has no `to`."""
    index = tl.program_id(0) * count.to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(x + index, 0.0)


@triton.jit
def square(x, y, inner, SIDE: tl.constexpr, STEP: tl.constexpr):
    """Two tiles of SIDE x STEP in shared memory, for each stage of the loop."""
    row = tl.arange(0, SIDE)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in tl.range(0, inner, STEP, num_stages=4):
        column = start + tl.arange(0, STEP)
        tile = tl.load(x + row[:, None] * inner + column[None, :])
        other = tl.load(x + row[None, :] * inner + column[:, None])
        total += tl.dot(tile.to(tl.bfloat16), other.to(tl.bfloat16))
    tl.store(y + row[:, None] * SIDE + row[None, :], total)
