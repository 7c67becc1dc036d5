"""Counter-based dropout mask: a pure function of (seed, row, column), so it is regenerated and never stored.

    key(row)      = splitmix64's finaliser of (mix(seed) + row * 0x9E3779B97F4A7C15), as two 32-bit words k0, k1
    h             = (column // 2) * 0x9E3779B9 ^ k0
    h             = (h ^ h >> 16) * 0x7FEB352D ^ k1
    h             = (h ^ h >> 15) * 0x846CA68B
    h             =  h ^ h >> 16
    u(row, col)   = the low 15 bits of h's lower (even column) or upper (odd column) half
    kept          = u >= round(p * 2^15)

All arithmetic is modulo 2^32 (2^64 for the key) and exact, so the Triton form (`kernels.py`) and this one agree bit
for bit on any device and for any launch shape. One 32-bit hash serves two columns; p is a multiple of 2^-15
(`effective_p` gives it), and survivors are scaled by the exact 1 / (1 - effective_p).

Sources: splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014); the 32-bit
mixing constants are Chris Wellons's "lowbias32".
"""

import torch
from torch import Tensor

LEVELS = 1 << 15
_GOLDEN_64 = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LONG = (1 << 64) - 1
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _signed(value: int, bits: int) -> int:
    """An unsigned word as two's complement: torch lacks a full set of unsigned operations."""
    return value - (1 << bits) if value >> (bits - 1) else value


def threshold(p: float) -> int:
    """The smallest 15-bit draw that is kept. Raises ValueError outside 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p={p} is outside 0 <= p < 1. Use 0 for no dropout.")
    return min(round(p * LEVELS), LEVELS - 1)


def effective_p(p: float) -> float:
    """The actual drop probability: p rounded to a multiple of 2^-15."""
    return threshold(p) / LEVELS


def mix_seed(seed: int) -> int:
    """Spreads a user's seed (any Python int) over 64 bits, so that neighbouring seeds give unrelated masks."""
    z = (seed + _GOLDEN_64) & _LONG
    z = ((z ^ (z >> 30)) * _MIX_1) & _LONG
    z = ((z ^ (z >> 27)) * _MIX_2) & _LONG
    return _signed(z ^ (z >> 31), 64)


def draw_seed() -> int:
    """A seed from torch's CPU generator: no device sync, and activation checkpointing restores its state."""
    return int(torch.randint(0, 1 << 62, ()).item())


def _row_keys(seed: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(k0, k1) of int64 row indices, each int32 of the same shape."""
    z = rows * _signed(_GOLDEN_64, 64) + mix_seed(seed)
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(_MIX_1, 64)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(_MIX_2, 64)
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    pair = z.contiguous().view(torch.int32).view(*rows.shape, 2)
    return pair[..., 0], pair[..., 1]


class BlockMask:
    """The mask of a matrix in blocks of rows, in scratch memory that the next block reuses.

    Fresh temporaries of a megabyte each would be mapped and faulted in for every block, which took longer than the
    hash.
    """

    def __init__(
        self,
        rows: Tensor,
        columns: int,
        *,
        p: float,
        seed: int,
        dtype: torch.dtype,
        block_rows: int,
        share: "BlockMask | None" = None,
    ) -> None:
        """`rows` int64 (T,) are indices in the whole matrix. `share`: a mask of the same sizes whose scratch is
        reused."""
        self.columns, self.limit, self.kind = columns, threshold(p), _BITS[dtype.itemsize]
        self.k0_T1, self.k1_T1 = (key[:, None].contiguous() for key in _row_keys(seed, rows))
        pairs, device = (columns + 1) // 2, rows.device
        self.column_P = torch.arange(pairs, dtype=torch.int32, device=device).mul_(_signed(0x9E3779B9, 32))
        self.hash: Tensor
        self.shifted: Tensor
        self.wide: Tensor | None = None
        if share is not None:
            self.hash, self.shifted, self.wide = share.hash, share.shifted, share.wide
            return
        self.hash, self.shifted = (torch.empty(block_rows, pairs, dtype=torch.int32, device=device) for _ in range(2))
        if self.kind is not torch.int16:
            self.wide = torch.empty(block_rows, columns, dtype=self.kind, device=device)

    def bits(self, block: slice) -> Tensor:
        """(rows, columns) as wide as the dtype's elements: -1 (all bits set) where kept, 0 where dropped."""
        k0, k1 = self.k0_T1[block], self.k1_T1[block]
        h, shifted = self.hash[: k0.shape[0]], self.shifted[: k0.shape[0]]
        torch.bitwise_xor(self.column_P, k0, out=h)
        torch.bitwise_right_shift(h, 16, out=shifted)
        h.bitwise_xor_(shifted.bitwise_and_(0xFFFF)).mul_(0x7FEB352D).bitwise_xor_(k1)
        torch.bitwise_right_shift(h, 15, out=shifted)
        h.bitwise_xor_(shifted.bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B, 32))
        torch.bitwise_right_shift(h, 16, out=shifted)
        h.bitwise_xor_(shifted.bitwise_and_(0xFFFF))
        draw = h.view(torch.int16)[:, : self.columns]
        draw.bitwise_and_(LEVELS - 1).sub_(self.limit).bitwise_right_shift_(15).bitwise_not_()
        return draw if self.wide is None else self.wide[: draw.shape[0]].copy_(draw)


def keep_bits(rows: Tensor, columns: int, p: float, seed: int, dtype: torch.dtype) -> Tensor:
    """All ones in the bits of an element of `dtype` where kept, zeros where dropped: an integer (T, columns).

    `rows` is int64 (T,): row indices in the whole matrix, so a caller can work on selected rows.
    """
    mask = BlockMask(rows, columns, p=p, seed=seed, dtype=dtype, block_rows=rows.numel())
    return mask.bits(slice(0, rows.numel()))


def keep_mask(rows: int, columns: int, *, p: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The bool (rows, columns) mask that every op here applies for this p and seed; True is kept."""
    return keep_bits(torch.arange(rows, device=device), columns, p, seed, torch.bfloat16).bool()


def masked_copy(x_TI: Tensor, bits_TI: Tensor) -> Tensor:
    """x with dropped elements zeroed (not rescaled), whatever they held; the bits are of x's dtype."""
    return (x_TI.view(bits_TI.dtype) & bits_TI).view(x_TI.dtype)


def mask_(x_TI: Tensor, bits_TI: Tensor) -> Tensor:
    """`masked_copy` in place."""
    x_TI.view(bits_TI.dtype).bitwise_and_(bits_TI)
    return x_TI


def dropout_reference(x_TI: Tensor, *, p: float, seed: int) -> Tensor:
    """dropout(x) = x * mask / (1 - effective_p) for a 2-D x: what the fused ops compute without storing the mask."""
    keep = keep_mask(x_TI.shape[0], x_TI.shape[1], p=p, seed=seed, device=x_TI.device)
    return x_TI * keep / (1.0 - effective_p(p))
