"""How an NF4 weight is stored.

Shapes: N elements, O out, I in.
"""

from typing import NamedTuple

from torch import Tensor

BLOCK = 64
NESTED_BLOCK = 256

# The 16 quantiles of a standard normal, scaled to [-1, 1] with an exact zero (QLoRA, appendix E).
CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class NF4Weight(NamedTuple):
    """A quantised (O, I) matrix.

    packed uint8 (ceil(N / 2),); absmax uint8 (ceil(N / 64),) with nested_absmax fp32 (ceil(len(absmax) / 256),) and
    nested_offset fp32 (), or absmax fp32 without nested tensors if double quantisation is off.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: tuple[int, int]
