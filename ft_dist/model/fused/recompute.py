"""Recompute in the backward pass a tensor that a layer would otherwise keep.

    product = glu(gate, up)
    with recomputed(product, lambda: glu(gate, up)):
        output = down_proj(product)

Whatever `down_proj` is (a linear layer, one with adapters, quantised): when it saves `product` or a view of it, the
graph stores the recipe instead, and the backward pass runs it. This costs no memory if gate and up are kept anyway, for
the backward pass of `glu`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Recipe = Callable[[], torch.Tensor]


class _Again(NamedTuple):
    """A view of the recipe's result, with the columns after the product's own unchanged."""

    recipe: Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    trailing: torch.Tensor | None

    def make(self) -> torch.Tensor:
        with torch.no_grad():
            view = self.recipe().as_strided(self.shape, self.stride, self.offset)
            if self.trailing is not None:
                view[..., -self.trailing.shape[-1] :] = self.trailing
        return view


def recomputed(product: torch.Tensor, recipe: Recipe) -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which tensors stored in `product`'s memory are saved as views of `recipe()`.

    The recipe must give the same bits in the same layout and hold neither `product` nor a graph. If the rows of
    `product` are the first columns of longer rows, the remaining columns are kept. Activation checkpointing around the
    context would keep what the recipe holds, so do not use the context there.
    """
    memory, width = product.untyped_storage()._cdata, product.shape[-1]
    row = product.stride(-2) if product.dim() > 1 else width

    def pack(tensor: torch.Tensor) -> Any:
        if tensor.untyped_storage()._cdata != memory:
            # keep the parameter object: ZeRO-3 moves its memory between forward and backward
            return tensor if tensor.is_leaf else tensor.detach()
        trailing = None
        if row > width and tensor.numel():
            first = tensor.storage_offset() % row
            if tensor.stride(-1) != 1 or first >= width:
                return tensor.detach().clone()
            excess = first + tensor.shape[-1] - width
            trailing = tensor.detach()[..., -excess:].clone() if excess > 0 else None
        return _Again(recipe, tensor.shape, tensor.stride(), tensor.storage_offset(), trailing)

    def unpack(packed: Any) -> torch.Tensor:
        return packed.make() if isinstance(packed, _Again) else packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
