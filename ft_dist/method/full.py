"""Full fine-tuning: every weight is trained."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ft_dist.method.protocol import Method

if TYPE_CHECKING:
    from ft_dist.model.parts.layers import Layers
    from ft_dist.model.shape import ModelShape, Parameter


class Full(Method):
    """Train every weight of the model."""

    kind: Literal["full"] = "full"

    frozen_base: ClassVar[bool] = False

    def adapt(self, causal_lm: Any, layers: "Layers", *, new_token_ids: Sequence[int] = ()) -> Any:
        return causal_lm

    def trains(self, name: str) -> bool:
        return True

    def trained(self, shape: "ModelShape") -> "list[Parameter]":
        return shape.parameters

    def fp8_conflict(self) -> str | None:
        return (
            "model.base_dtype=fp8 applies to frozen weights, and method.kind=full trains every weight; use "
            "method.kind=lora, or remove model.base_dtype"
        )
