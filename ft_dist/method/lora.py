"""LoRA (Hu et al., arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353) through peft."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ft_dist_kernels.sizes import MAX_EXTENDED_RANK
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from ft_dist.errors import ModelError
from ft_dist.method.protocol import Method
from ft_dist.method.targets import ALL_LINEAR, Choice, Wanted, around, choose, in_layers, match_target_modules

if TYPE_CHECKING:
    from ft_dist.model.parts.layers import Layers
    from ft_dist.model.shape import ModelShape, Parameter


OF_ADAPTERS = (".lora_", ".trainable_tokens_", ".modules_to_save.")
"""In the names of what peft adds to a model to train it"""


class Lora(Method):
    """Train low-rank adapters and freeze the model's weights."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    alpha: float = Field(
        default=32.0, gt=0, description="The update is scaled by alpha / rank (with rslora: alpha / sqrt(rank))"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = Field(
        default="all-linear",
        description="Layers with adapters, by full name or its end; all-linear: every linear layer but the output "
        "head and the routers of experts",
    )
    exclude_modules: list[str] | None = Field(
        default=None,
        description="Layers of target_modules that get no adapters, by their names or those of modules around them",
    )
    layers_to_transform: list[NonNegativeInt] | None = Field(
        default=None,
        description="Numbers of the decoder layers that get adapters; None: all. A named layer outside them, such as "
        "lm_head, keeps its adapter",
    )
    modules_to_save: list[str] | None = Field(
        default=None, description="Modules that train whole, such as lm_head, a router or norms"
    )
    rslora: bool = False
    dora: bool = False

    frozen_base: ClassVar[bool] = True
    fixed_keys: ClassVar[tuple[str, ...]] = (
        "rank",
        "alpha",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "modules_to_save",
        "rslora",
        "dora",
    )

    @field_validator("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save", mode="before")
    @classmethod
    def _comma_list(cls, value: object) -> object:
        if isinstance(value, str) and value != ALL_LINEAR:
            return [name.strip() for name in value.split(",") if name.strip()]
        return value

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _one_layer(cls, value: object) -> object:
        return [value] if type(value) is int else value

    @field_validator("target_modules", mode="before")
    @classmethod
    def _some_target(cls, value: object) -> object:
        if value == []:
            raise ValueError(f"[] names no layer; use {ALL_LINEAR}, or list the layers that get adapters")
        return value

    @field_validator("exclude_modules", "layers_to_transform", "modules_to_save")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        # older runs have no such key, which a resume compares as None
        return value or None

    def adapt(self, causal_lm: Any, layers: "Layers", *, new_token_ids: Sequence[int] = ()) -> Any:
        """Also trains the rows of new tokens in embedding and head: frozen, they would keep their initial mean."""
        import peft

        choice = self._choose(layers)
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=choice.modules,
            target_parameters=choice.parameters or None,
            use_rslora=self.rslora,
            use_dora=self.dora,
            modules_to_save=choice.whole or None,
            trainable_token_indices=token_rows(layers, choice, new_token_ids) or None,
        )
        try:
            adapted = peft.get_peft_model(causal_lm, settings)
        except (ValueError, TypeError) as error:
            raise ModelError(f"method.target_modules={self.target_modules}: {str(error).splitlines()[0]}") from error
        if lost := lost_adapters(adapted):
            raise ModelError(
                f"method.target_modules={self.target_modules}: peft would not load the adapters of {lost[0]}, because "
                f"transformers renames them. Set method.exclude_modules={','.join(lost)}."
            )
        return adapted

    def trains(self, name: str) -> bool:
        return any(part in name for part in OF_ADAPTERS)

    def check(self, layers: "Layers") -> list[str]:
        return self._choose(layers).notes

    def _choose(self, layers: "Layers") -> Choice:
        wanted = Wanted(
            self.target_modules,
            self.exclude_modules or (),
            self.layers_to_transform,
            self.modules_to_save or (),
            plain=not self.dropout and not self.dora,
        )
        return choose(layers, wanted)

    def adapted(self, shape: "ModelShape") -> "list[Parameter]":
        matrices = {p.name.removesuffix(".weight"): p for p in shape.parameters if p.linear}
        if self.target_modules != ALL_LINEAR:
            matrices["lm_head"] = shape.head
        names = match_target_modules(matrices, self.target_modules, strict=shape.known)
        out = [*(self.exclude_modules or ()), *(self.modules_to_save or ())]
        layers, targets = self.layers_to_transform, self.target_modules
        kept = (name for name in names if not _within(name, out) and in_layers(name, targets, layers))
        return [matrices[name] for name in kept]

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
        return found + self.whole(shape)

    def whole(self, shape: "ModelShape") -> "list[Parameter]":
        """The parameters of modules that train whole, as far as the shape knows them."""
        every = [*shape.parameters, *([shape.head] if shape.tied else [])]
        return [p for p in every if _within(p.name.rpartition(".")[0], self.modules_to_save or ())]

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


def lost_adapters(adapted: Any) -> list[str]:
    """Modules, without the layer's number, whose adapters peft would save but not load again.

    Works under ZeRO-3 too: adapters are whole until the engine partitions them.
    """
    import peft

    lost = lost_tensors(adapted, peft.get_peft_model_state_dict(adapted))
    names = {name.partition(".lora_")[0] for name in lost if ".lora_" in name}
    return sorted({re.split(r"\.\d+\.", name)[-1] for name in names})


def lost_tensors(adapted: Any, saved: dict[str, Any]) -> list[str]:
    """Load the adapter `saved`, tensors by their names in its file; returns those that peft passes over, without a
    word."""
    import peft

    loaded = peft.set_peft_model_state_dict(adapted, saved)
    if not loaded.unexpected_keys:
        return []
    unread = set(loaded.unexpected_keys)  # under the names that transformers gives them
    missing = {name.replace(f".{adapted.active_adapter}", "") for name in loaded.missing_keys}
    passed_over = saved.keys() & (missing | unread)
    # whole modules and rows of new tokens are in the file twice, if they belong to the embedding or the head
    read = [tensor for name, tensor in saved.items() if name not in passed_over]
    lost = sorted(name for name in passed_over if not any(_same(saved[name], other) for other in read))
    return lost or sorted(unread - saved.keys())


def _same(tensor: Any, other: Any) -> bool:
    """False without values: `ft-dist check` may have a model of names and shapes alone."""
    if tensor.is_meta or tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    return bool((tensor == other).all())


def token_rows(layers: "Layers", choice: Choice, new_token_ids: Sequence[int]) -> dict[str, list[int]]:
    """The rows of new tokens that train by module: in the embedding, and in a head that has weights of its own and
    trains neither whole nor through an adapter. peft adds a tied head itself.

    Raises ModelError where a tied head and embedding would part and leave one of them without the new rows.
    """
    if not new_token_ids:
        return {}
    ends = (layers.embedding, layers.head)
    whole = [name for name in ends if name in choice.whole]
    if layers.tied and len(whole) == 1:
        raise ModelError(
            f"method.modules_to_save={whole[0]}: with model.new_tokens, a tied embedding and head train whole only "
            f"together. Name {ends[0]} and {ends[1]}, or neither."
        )
    ids = sorted(set(new_token_ids))
    modules = [layers.embedding]
    if not layers.tied and layers.head not in choice.modules:
        modules.append(layers.head)
    return {name: ids for name in modules if name not in whole}


def _within(name: str, modules: Sequence[str]) -> bool:
    """Whether `name` or a module around it is one of `modules`, by full name or its end."""
    return any(module == outer or outer.endswith(f".{module}") for module in modules for outer in around(name))
