"""What every training method answers. Importing a method needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ft_dist.config.schema import RunConfig
    from ft_dist.model.facts import ModelFacts


class Method(Protocol):
    frozen_base: bool
    """The base weights are not trained: `final/` and commits leave them out, and the base model may not change"""
    fixed_keys: tuple[str, ...]
    """Config keys that a resumed run may not change, in addition to those of every method"""

    def adapt(self, causal_lm: Any, config: RunConfig, tokenizer: Any) -> Any:
        """The model to train. Raises ModelError."""
        ...

    def check(self, config: RunConfig, facts: ModelFacts) -> None:
        """Raise ConfigError if the method's settings do not fit the model."""
        ...
