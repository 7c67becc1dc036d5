"""How an FP8 weight is stored.

Shapes: O out, I in.
"""

from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
SIDE = 16
"""Both sides of a weight are multiples of this, as FP8 matrix instructions require"""
MAX_ROW = 1 << 15
"""Most elements of a row that the quantiser holds on chip; longer rows of several weights are quantised one by one"""
LARGEST = 448.0
LEAST_MAXIMUM = 2.0**-64
"""Smallest maximum of a row: below it the inverse of a scale, or the product of two, would exceed fp32"""


class FP8Matrix(NamedTuple):
    """W in e4m3, once with one row per output (O, I) and once with one row per input (I, O); scales fp32 (O,), (I,).

    On CPU the codes are widened to bf16.
    """

    by_output: Tensor
    output_scale: Tensor
    by_input: Tensor
    input_scale: Tensor


class FP8Weight(NamedTuple):
    """A weight (end - begin, I): outputs of a matrix that other weights may share."""

    matrix: FP8Matrix
    begin: int
    end: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.begin, self.matrix.by_output.shape[1]
