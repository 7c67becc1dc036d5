"""Block sizes and splits of the LoRA kernels, chosen by group, shapes and chip; cases for aot.py.

Shapes: T tokens, I in, O out, R rank, S concatenated ranks of a group.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ft_dist_kernels.aot import AotCase, Chip
from ft_dist_kernels.lora.torch_form import Member

# Programs a launch aims for when it splits tokens: about two for each multiprocessor of the largest chip. A constant,
# because the split decides the order of the sums, and so the bits.
_PROGRAMS = 256
# (elements per program, partial sums loaded together)
SUM = (1024, 8)
# Between these token counts `down` fills only part of the chip and is not launch-bound, so its products are split
_SPLIT_TOKENS = (512, 4096)
_SPLIT_COLUMNS = 1024  # at least, of X
_MAX_SPLITS = 8
# Above this rank dB does not fit next to its tile, and the partial sums of dS would cost more than reading dY again.
ONE_READ_RANK = 64


class Blocks(NamedTuple):
    tokens: int
    features: int
    warps: int
    stages: int


# Keyed by the padded ranks held on chip (members * rank for the two `down` kernels, rank for `up`), the first that is
# large enough. Chosen so that no chip spills or exceeds its shared memory (`python -m benchmarks.kernels.resources`);
# CDNA3 gives a lane 512 registers at four warps and 256 at eight, and its 64 KiB of LDS hold two stages at most.
_Table = dict[int, Blocks]
DOWN: dict[str, _Table] = {
    "cuda": {
        32: Blocks(64, 128, 4, 3),
        48: Blocks(64, 64, 8, 3),
        64: Blocks(64, 64, 4, 3),
        128: Blocks(64, 64, 8, 3),
        192: Blocks(32, 64, 8, 3),
    },
    "hip": {48: Blocks(64, 128, 4, 2), 96: Blocks(64, 64, 4, 2), 192: Blocks(64, 64, 8, 2)},
}
UP_BACKWARD: dict[str, _Table] = {
    "cuda": {16: Blocks(32, 512, 16, 2), 32: Blocks(32, 256, 8, 3), 64: Blocks(32, 256, 8, 3)},
    "hip": {16: Blocks(32, 512, 8, 2), 32: Blocks(32, 256, 4, 2), 64: Blocks(32, 128, 4, 2)},
}
DOWN_BACKWARD: dict[str, _Table] = {
    "cuda": {32: Blocks(64, 128, 8, 3), 96: Blocks(64, 64, 8, 3), 192: Blocks(64, 32, 8, 2)},
    "hip": {32: Blocks(64, 128, 8, 2), 96: Blocks(64, 64, 4, 2), 192: Blocks(64, 32, 4, 2)},
}


def blocks_for(tables: dict[str, _Table], ranks: int, *, hip: bool, itemsize: int) -> Blocks:
    chosen = next(blocks for limit, blocks in tables["hip" if hip else "cuda"].items() if ranks <= limit)
    if itemsize > 2:
        # fp32 operands take twice the shared memory, and their products run on registers.
        return chosen._replace(features=max(16, chosen.features // 4), stages=1)
    return chosen


def padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def precision(dtype: torch.dtype) -> str:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def split_rows(tokens: int, block: int, columns: int) -> tuple[int, int]:
    """(splits of the rows, rows of each), from the shapes alone."""
    blocks = triton.cdiv(tokens, block)
    per_split = triton.cdiv(blocks, min(blocks, max(1, _PROGRAMS // columns)))
    return triton.cdiv(blocks, per_split), per_split * block


def three(values: Sequence[Any], filler: Any) -> list[Any]:
    return [*values, *[filler] * (3 - len(values))]


def group_blocks(tables: dict[str, _Table], x_TI: Tensor, members: Sequence[Member]) -> tuple[Blocks, int]:
    rank = max(padded(member.rank) for member in members)
    hip = torch.version.hip is not None
    return blocks_for(tables, rank * len(members), hip=hip, itemsize=x_TI.element_size()), rank


def blocks_of_down(x_TI: Tensor, members: Sequence[Member]) -> Blocks:
    return group_blocks(DOWN, x_TI, members)[0]


def split_columns(tokens: int, in_features: int, blocks: Blocks) -> tuple[int, int]:
    """(splits of X's columns, columns of each) of `down`, from the shapes alone."""
    programs, splits = triton.cdiv(tokens, blocks.tokens), 1
    if _SPLIT_TOKENS[0] < tokens <= _SPLIT_TOKENS[1]:
        splits = max(1, min(_PROGRAMS // 2 // programs, in_features // _SPLIT_COLUMNS, _MAX_SPLITS))
    columns = triton.cdiv(triton.cdiv(in_features, blocks.features), splits) * blocks.features
    return triton.cdiv(in_features, columns), columns


def _signature(kernel: Any, types: dict[str, str]) -> dict[str, str]:
    """Every argument of the kernel in order; those not in `types` are 16-bit or partial-sum pointers, or constants."""
    return {name: types.get(name, "constexpr" if name.isupper() else "*bf16") for name in kernel.arg_names}


def _each(*names: str) -> list[str]:
    return [f"{name}{member}" for name in names for member in range(3)]


# Known to be multiples of 16, always or whenever the rank is: what a launch specialises on
_ALIGNED = ["in_features", "columns_per_split", "stride_x", "stride_w", "spare", "a_numel", "b_numel", *_each("O")]
_BY_RANK = [*_each("R", "C"), "stride_s", "stride_ds", "stride_out", "width", "out_width"]
_FREE = ["T", "rows_per_split", "blocks", "a_blocks", "a_splits", "b_splits", *_each("limit", "count")]
_TYPES = {
    **dict.fromkeys((*_ALIGNED, *_BY_RANK, *_FREE, *_each("stride_dy")), "i32"),
    **dict.fromkeys(_each("seed"), "i64"),
    **dict.fromkeys(_each("alpha"), "fp32"),
    **dict.fromkeys(("ds_parts", "db_parts", "da_parts", "parts", "a_parts", "b_parts"), "*fp32"),
}


def aot_case(name: str, kernel: Any, constexprs: dict[str, Any], warps: int, stages: int, rank: int = 16) -> AotCase:
    signature = _signature(kernel, _TYPES)
    known = {*_ALIGNED, *_each("stride_dy")} | {name for name, kind in signature.items() if kind.startswith("*")}
    if rank % 16 == 0:
        known |= set(_BY_RANK)
    divisible = tuple(name for name in signature if name in known)
    return AotCase(name, kernel, signature, constexprs, divisible, {"num_warps": warps, "num_stages": stages})


# (rank, members, dropout): every size with dropout, some also without
AOT_GROUPS = [
    (rank, members, dropout)
    for rank, members in ((16, 1), (16, 3), (8, 1), (32, 2), (64, 1), (64, 2), (64, 3), (128, 1))
    for dropout in ((True, False) if (rank, members) in ((16, 1), (64, 3)) else (True,))
]


def aot_down(chip: Chip, rank: int, members: int, dropout: bool) -> tuple[dict[str, Any], Blocks]:
    blocks = blocks_for(DOWN, padded(rank) * members, hip=chip == "gfx942", itemsize=2)
    tile = {"BLOCK_T": blocks.tokens, "BLOCK_I": blocks.features}
    return {"N": members, "RP": padded(rank), "DROPOUT": dropout, "P": "tf32", **tile}, blocks
