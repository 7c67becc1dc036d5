"""A pass over rows in blocks that stay in a CPU's cache through all the steps of the pass."""

from collections.abc import Iterator

from torch import Tensor

TILE_ELEMENTS = 256 * 1024
"""Of one operand"""


def tiles(row_elements: int, *tensors: Tensor, dim: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Blocks along `dim` of tensors that are equally long there; a row of the largest has `row_elements`. Where one
    block holds all, the tensors as they are: views have a price where passes are short."""
    step = max(1, TILE_ELEMENTS // max(row_elements, 1))
    if tensors[0].shape[dim] <= step:
        return iter([tensors])
    return zip(*(tensor.split(step, dim) for tensor in tensors), strict=True)
