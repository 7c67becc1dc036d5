"""Blocks of rows that stay in a CPU's cache through all steps of a pass, and buffers with spare columns per row."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ft_dist_kernels.sizes import TILE_ELEMENTS


def tiles(row_elements: int, *tensors: Tensor, dim: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Blocks along `dim` of tensors that are equally long there; a row of the largest has `row_elements`. If one block
    holds everything, the tensors themselves: views cost time in short passes."""
    step = max(1, TILE_ELEMENTS // max(row_elements, 1))
    if tensors[0].shape[dim] <= step:
        return iter([tensors])
    return zip(*(tensor.split(step, dim) for tensor in tensors), strict=True)


def empty_with_spare(shape: Sequence[int], spare: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """An empty tensor of `shape`, and its rows (T, shape[-1]): the first columns of rows that are `spare` longer."""
    width = shape[-1]
    buffer = torch.empty((*shape[:-1], width + spare), dtype=like.dtype, device=like.device)[..., :width]
    rows = buffer.flatten(0, -2) if buffer.dim() > 1 else buffer[None]
    return buffer, rows
