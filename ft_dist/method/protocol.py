"""What a training method is: the options of its config section, and its answers to engine, checkpoints and planner.

Importing a method needs no torch. To add a method, subclass `Method` in a new file and add a line to `table.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr

from ft_dist.method.section import Section

if TYPE_CHECKING:
    from ft_dist.model.parts.layers import Layers
    from ft_dist.model.shape import ModelShape, Parameter


class Method(Section, ABC):
    """The config section `method`. The fields of a subclass, including `kind`, are its options."""

    frozen_base: ClassVar[bool]
    """The base weights are not trained: commits and `final/` omit them, and a resume needs the same base model"""
    fixed_keys: ClassVar[tuple[str, ...]] = ()
    """Options that a resumed run may not change, because the saved tensors depend on them"""

    _unused: tuple[str, ...] = PrivateAttr(default=())

    @property
    def unused(self) -> tuple[str, ...]:
        """Options of other methods that the config sets; `ft-dist check` and a run report them."""
        return self._unused

    @abstractmethod
    def adapt(self, causal_lm: Any, layers: "Layers", *, new_token_ids: Sequence[int] = ()) -> Any:
        """The model to train, with `requires_grad` set; `layers` are its own. Raises ModelError."""

    @abstractmethod
    def trains(self, name: str) -> bool:
        """Whether the parameter called `name` in the adapted model has a gradient."""

    def check(self, layers: "Layers") -> list[str]:
        """One line per thing that the options leave out and the user may not expect. Raises ModelError if they do not
        fit the model."""
        return []

    def adapted(self, shape: "ModelShape") -> "list[Parameter]":
        """The matrices that carry adapters. Raises ModelError for options that match nothing in a known family."""
        return []

    @abstractmethod
    def trained(self, shape: "ModelShape") -> "list[Parameter]":
        """Parameters with a gradient, adapters by their own names."""

    @property
    def adapter_rank(self) -> int:
        """Width of S = x A^T that a matrix with an adapter keeps for its backward pass; 0 without adapters."""
        return 0

    @property
    def merges_products(self) -> bool:
        """Whether matrices that read the same x run as one product with their adapters (`model/fused/merged.py`)."""
        return False

    def matrix_gradient(self, out: int, width: int, *, adapted: bool) -> int:
        """Elements of the gradients that the backward pass of an (out, width) matrix computes for its parameters."""
        return out * width

    def fp8_conflict(self) -> str | None:
        """Why `model.base_dtype: fp8` cannot be used with these options, as a phrase with a fix; None if it can."""
        return None
