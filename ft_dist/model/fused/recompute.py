"""A tensor that a layer would keep for its backward pass, made once more there instead.

    product = glu(gate, up)
    with recomputed(product, lambda: glu(gate, up)):
        output = down_proj(product)

Whatever `down_proj` is (a linear layer, one with adapters, quantised), where it saves `product` or a view of it the
graph holds the recipe, which backward runs when it asks for the tensor. It costs no memory where gate and up are kept
anyway, for the backward pass of `glu`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Recipe = Callable[[], torch.Tensor]


class _Again(NamedTuple):
    """A view of what the recipe makes, with the columns `behind` the product's own as they were."""

    recipe: Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    behind: torch.Tensor | None

    def make(self) -> torch.Tensor:
        with torch.no_grad():
            view = self.recipe().as_strided(self.shape, self.stride, self.offset)
            if self.behind is not None:
                view[..., -self.behind.shape[-1] :] = self.behind
        return view


def recomputed(product: torch.Tensor, recipe: Recipe) -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which tensors that lie in `product`'s memory are saved as views of `recipe()`.

    The recipe gives the same bits in the same layout, and holds neither `product` nor a graph. Where the rows of
    `product` are the first columns of longer ones, what others write behind them is kept. Activation checkpointing
    around the context would keep what the recipe holds: leave the context out there.
    """
    memory, width = product.untyped_storage()._cdata, product.shape[-1]
    row = product.stride(-2) if product.dim() > 1 else width

    def pack(tensor: torch.Tensor) -> Any:
        if tensor.untyped_storage()._cdata != memory:
            # a parameter as the object it is: ZeRO-3 moves its memory between forward and backward
            return tensor if tensor.is_leaf else tensor.detach()
        behind = None
        if row > width and tensor.numel():
            first = tensor.storage_offset() % row
            if tensor.stride(-1) != 1 or first >= width:
                return tensor.detach().clone()
            excess = first + tensor.shape[-1] - width
            behind = tensor.detach()[..., -excess:].clone() if excess > 0 else None
        return _Again(recipe, tensor.shape, tensor.stride(), tensor.storage_offset(), behind)

    def unpack(packed: Any) -> torch.Tensor:
        return packed.make() if isinstance(packed, _Again) else packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
