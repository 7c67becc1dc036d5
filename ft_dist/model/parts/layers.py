"""The layers of a model that a method can adapt or train whole."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from ft_dist.model.anatomy.decoder import other_parameters
from ft_dist.model.anatomy.probe import is_linear
from ft_dist.model.anatomy.source import reads_weight
from ft_dist.model.parts.kinds import EMBEDDINGS, EXPERTS, HEAD, ROUTER, kinds_of

_NO_GRADIENT = "no gradient reaches it through the choice of its top tokens"
_READS_WEIGHT = "its layer reads the weight itself, past an adapter"
_OWN_PRODUCT = "its product is not that of a linear layer"


@dataclass(frozen=True)
class Layers:
    """The parameters of a model by name, and the modules among them that a method may pick.

    Of a multimodal model, those of its text model.
    """

    shapes: Mapping[str, tuple[int, ...]]
    embedding: str
    head: str
    tied: bool
    model_type: str
    linears: tuple[str, ...]
    """Modules that carry adapters by default: matrices outside embeddings, head, routers and stacked experts"""
    router_linears: frozenset[str] = frozenset()
    """Routers that are linear layers"""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Linear layers on which an adapter cannot work, and why"""
    adapts_experts: bool = False
    """Whether peft adapts the stacked experts of this architecture; it then reads their old names (`gate_proj`) in
    `target_modules` as the stacked matrices, wherever in the model they occur"""
    other_parts: tuple[str, ...] = ()
    """The modules of a multimodal model's other parts, which no method trains"""

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The kind of each parameter, as in `kinds`."""
        return kinds_of(self.shapes, embedding=self.embedding, head=self.head)

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """The experts' parameters, if they are not those of linear layers."""
        linears = set(self.linears)
        return tuple(
            name for name, kind in self.kinds.items() if kind == EXPERTS and name.rpartition(".")[0] not in linears
        )

    @cached_property
    def routers(self) -> tuple[str, ...]:
        """Modules with the matrix that chooses experts."""
        matrices = (name for name, kind in self.kinds.items() if kind == ROUTER and len(self.shapes[name]) > 1)
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in matrices if name.endswith(".weight")))

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every module that has parameters, in itself or in its children."""
        return _modules((*self.shapes, f"{self.head}.weight"))

    def share(self, names: tuple[str, ...]) -> float:
        """The share of these parameters in all of the model."""
        return sum(prod(self.shapes[name]) for name in names) / max(1, sum(map(prod, self.shapes.values())))


def layers_of(causal_lm: Any) -> Layers:
    """Of a model without adapters; its weights may be partitioned by ZeRO-3, or on the meta device."""
    from torch import nn

    modules = dict(causal_lm.named_modules())
    names = {id(module): name for name, module in modules.items()}
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    others = {id(parameter) for parameter in other_parameters(causal_lm)}
    parameters = {name: p for name, p in causal_lm.named_parameters() if id(p) not in others}
    of_others = [name for name, p in causal_lm.named_parameters() if id(p) in others]
    bare = Layers(
        shapes={name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()},
        embedding=names[id(embedding)],
        head=names.get(id(head), "lm_head"),
        tied=head is not None and head.weight is embedding.weight,
        model_type=str(getattr(causal_lm.config, "model_type", "")),
        linears=(),
    )
    linear = [
        name
        for name, module in modules.items()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and id(module.weight) not in others
    ]
    kinds = {name: bare.kinds.get(f"{name}.weight") for name in linear if name != bare.head}
    return replace(
        bare,
        linears=tuple(name for name, kind in kinds.items() if kind not in (ROUTER, EMBEDDINGS, HEAD)),
        router_linears=frozenset(name for name, kind in kinds.items() if kind == ROUTER),
        unfit={name: reason for name in kinds if (reason := _unfit(causal_lm, modules, name))},
        adapts_experts=peft_adapts_experts(bare.model_type),
        other_parts=tuple(name for name in _modules(of_others) if name not in bare.modules),
    )


def _modules(parameters: Iterable[str]) -> tuple[str, ...]:
    """The modules around these parameters."""
    found: dict[str, None] = {}
    for name in parameters:
        path = name.split(".")[:-1]
        found |= dict.fromkeys(".".join(path[: depth + 1]) for depth in range(len(path)))
    return tuple(found)


def peft_adapts_experts(model_type: str) -> bool:
    """Whether the installed peft rewrites adapters of this architecture's experts for the stacked matrices."""
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return pattern in conversion._MOE_TARGET_MODULE_MAPPING


def _unfit(causal_lm: Any, modules: Mapping[str, Any], name: str) -> str | None:
    """Why an adapter on this linear layer would fail or do nothing; None if it works."""
    from torch import nn

    path, _, leaf = name.rpartition(".")
    module, parent = modules[name], modules[path]
    in_model_file = type(module).__module__ == type(causal_lm).__module__
    if in_model_file and isinstance(module, nn.Linear) and not is_linear(module):
        return _OWN_PRODUCT
    if "indexer" in path.split("."):
        return _NO_GRADIENT
    config = causal_lm.config.get_text_config()
    return _READS_WEIGHT if reads_weight(parent, leaf, config=config) else None
