"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_dist.config.schema import RunConfig
    from ft_dist.model.facts import ModelFacts


class Full:
    frozen_base = False
    fixed_keys: tuple[str, ...] = ()

    def adapt(self, causal_lm: Any, config: RunConfig, tokenizer: Any) -> Any:
        return causal_lm

    def check(self, config: RunConfig, facts: ModelFacts) -> None:
        pass
