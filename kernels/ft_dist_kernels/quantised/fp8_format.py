"""How an FP8 weight is stored.

Shapes: O out, I in.
"""

from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
SIDE = 16
"""Both sides of a weight are multiples of this: what FP8 matrix instructions take"""
MAX_ROW = 1 << 15
"""Elements of a row that the quantiser holds on chip; rows of several weights beyond that are quantised one by one"""
LARGEST = 448.0
LEAST_MAXIMUM = 2.0**-64
"""Of a row: below it the inverse of a scale, and the product of two, would leave fp32"""


class FP8Matrix(NamedTuple):
    """W in e4m3, once a row for every output (O, I) and once a row for every input (I, O); scales fp32 (O,), (I,).

    On CPU the codes are widened to bf16.
    """

    by_output: Tensor
    output_scale: Tensor
    by_input: Tensor
    input_scale: Tensor


class FP8Weight(NamedTuple):
    """A weight (end - begin, I): these outputs of a matrix, which other weights may share."""

    matrix: FP8Matrix
    begin: int
    end: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.begin, self.matrix.by_output.shape[1]
