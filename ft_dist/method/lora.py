"""LoRA (Hu et al., arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353) through peft."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ft_dist_kernels.sizes import MAX_EXTENDED_RANK
from pydantic import Field, PositiveInt, field_validator

from ft_dist.errors import ModelError
from ft_dist.method.protocol import Method

if TYPE_CHECKING:
    from ft_dist.model.facts import ModelFacts
    from ft_dist.model.shape import ModelShape, Parameter


class Lora(Method):
    """Train low-rank adapters and freeze the model's weights."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    alpha: float = Field(
        default=32.0, gt=0, description="The update is scaled by alpha / rank (with rslora: alpha / sqrt(rank))"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False

    frozen_base: ClassVar[bool] = True
    fixed_keys: ClassVar[tuple[str, ...]] = ("rank", "alpha", "target_modules", "rslora", "dora")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _comma_list(cls, value: object) -> object:
        if isinstance(value, str) and value != "all-linear":
            return [name.strip() for name in value.split(",") if name.strip()]
        return value

    def adapt(self, causal_lm: Any, *, new_token_ids: Sequence[int] = ()) -> Any:
        """Also trains the embedding rows of new tokens: frozen, they would keep their initial mean."""
        import peft

        settings = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            use_rslora=self.rslora,
            use_dora=self.dora,
            trainable_token_indices=list(new_token_ids) or None,
        )
        try:
            return peft.get_peft_model(causal_lm, settings)
        except ValueError as error:
            raise ModelError(f"method.target_modules={self.target_modules}: {str(error).splitlines()[0]}") from error

    def trains(self, name: str) -> bool:
        return any(part in name for part in (".lora_", ".trainable_tokens_", ".modules_to_save."))

    def check(self, facts: "ModelFacts") -> None:
        if self.target_modules == "all-linear":
            return
        heads = {"lm_head", *(name.removesuffix(".weight") for name, shape in facts.shapes.items() if len(shape) == 2)}
        names = [*facts.linear_modules, *sorted(heads - set(facts.linear_modules))]
        match_target_modules(names, self.target_modules)

    def adapted(self, shape: "ModelShape") -> "list[Parameter]":
        matrices = {p.name.removesuffix(".weight"): p for p in shape.parameters if p.linear}
        if self.target_modules == "all-linear":
            return list(matrices.values())
        matrices["lm_head"] = shape.head
        return [matrices[name] for name in match_target_modules(matrices, self.target_modules)]

    def trained(self, shape: "ModelShape") -> "list[Parameter]":
        found = []
        for matrix in self.adapted(shape):
            out, width = matrix.shape
            name = matrix.name.removesuffix(".weight")
            shapes: dict[str, tuple[int, ...]] = {"lora_A": (self.rank, width), "lora_B": (out, self.rank)}
            if self.dora:
                shapes["lora_magnitude_vector"] = (out,)
            found += [
                replace(matrix, name=f"{name}.{part}.weight", shape=size, linear=False) for part, size in shapes.items()
            ]
        return found

    @property
    def adapter_rank(self) -> int:
        return self.rank

    @property
    def merges_products(self) -> bool:
        return not self.dora and self.rank <= MAX_EXTENDED_RANK

    def matrix_gradient(self, out: int, width: int, *, adapted: bool) -> int:
        return self.rank * (out + width) if adapted else 0

    def fp8_conflict(self) -> str | None:
        if not self.dora:
            return None
        return (
            "model.base_dtype=fp8 cannot be used with method.dora=true, which needs the norms of whole weights; set "
            "one of them to its default"
        )


def match_target_modules(names: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """The modules among `names` that peft would adapt: `all-linear` means all; otherwise a target matches a module of
    that full name, or one whose name ends in `.target`.

    Raises ModelError for a target that matches nothing; peft complains only if no target matches.
    """
    names = list(names)
    if targets == "all-linear":
        return names
    targets = [targets] if isinstance(targets, str) else list(targets)
    for target in targets:
        if not any(_matches(name, target) for name in names):
            leaves = sorted({name.rpartition(".")[2] for name in names})
            near = difflib.get_close_matches(target, [*leaves, *names], n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise ModelError(
                f"method.target_modules={target}: matches no linear layer of this model. {hint}"
                f"It has {', '.join(leaves)}; all-linear adapts all of them."
            )
    return [name for name in names if any(_matches(name, target) for target in targets)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
