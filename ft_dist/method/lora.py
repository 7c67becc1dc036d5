"""LoRA (Hu et al., arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353) through peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_dist.config.schema import RunConfig
    from ft_dist.model.facts import ModelFacts


class Lora:
    frozen_base = True
    fixed_keys: tuple[str, ...] = (
        "method.rank",
        "method.alpha",
        "method.target_modules",
        "method.rslora",
        "method.dora",
    )

    def adapt(self, causal_lm: Any, config: RunConfig, tokenizer: Any) -> Any:
        from ft_dist.model.load import add_adapters

        new_ids = [tokenizer.convert_tokens_to_ids(token) for token in config.model.new_tokens]
        return add_adapters(causal_lm, config.method, new_token_ids=new_ids)

    def check(self, config: RunConfig, facts: ModelFacts) -> None:
        from ft_dist.model.facts import match_target_modules

        targets = config.method.target_modules
        if targets == "all-linear":
            return
        heads = {"lm_head", *(name.removesuffix(".weight") for name, shape in facts.shapes.items() if len(shape) == 2)}
        match_target_modules([*facts.linear_modules, *sorted(heads - set(facts.linear_modules))], targets)
