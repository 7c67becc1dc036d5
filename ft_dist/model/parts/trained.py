"""How much of each kind of part a run trains."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ft_dist.model.anatomy.decoder import other_parameters
from ft_dist.model.parts.kinds import KINDS, Shapes, kinds_of

# what peft adds to the names of the modules that it wraps
_WRAPPERS = {"base_layer", "original_module", "token_adapter"}


@dataclass(frozen=True)
class TrainedParts:
    """Elements of the base model by kind: `total`, and `trained`, those in matrices that train or carry an adapter."""

    total: Mapping[str, int]
    trained: Mapping[str, int]

    def share(self, kind: str) -> float:
        """From 0 to 1; 0 for a kind that the model does not have."""
        return self.trained.get(kind, 0) / self.total[kind] if self.total.get(kind) else 0.0

    def line(self) -> str:
        return ", ".join(f"{kind} {percent(self.share(kind))}" for kind in KINDS if self.total.get(kind))


def percent(share: float) -> str:
    """Never 0% for a little, or 100% for not quite all."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0 < share < 0.1 or 0.99 <= share < 1:
        return f"{min(share * 100, 99.9):.1f}%"
    return f"{share:.0%}"


def trained_parts(model: Any) -> TrainedParts:
    """How much of each kind `model`, adapted by a method, trains. Its weights may be partitioned by ZeRO-3 or in FP8.

    Of an embedding or head of which only the rows of new tokens train, those rows count. Of a multimodal model, only
    the text model counts.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {id(module): unwrapped(name) for name, module in base.named_modules()}
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    embedding, head = (names.get(id(module), "") for module in ends)
    shapes: dict[str, tuple[int, ...]] = {}
    trained: set[str] = set()
    rows: dict[str, int] = {}
    # a tied head has the embedding's parameter
    first: dict[int, str] = {}
    alias: dict[str, str] = {}
    others = {id(parameter) for parameter in other_parameters(base)}
    for full, parameter in base.named_parameters(remove_duplicate=False):
        if id(parameter) in others:
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if ".modules_to_save." in full:
            if parameter.requires_grad:
                module, _, own = full.partition(".modules_to_save.")
                trained.add(f"{unwrapped(module)}.{own.partition('.')[2]}")
        elif ".trainable_tokens_delta." in full:
            rows[unwrapped(full.partition(".trainable_tokens_delta.")[0]) + ".weight"] = prod(shape)
        elif ".lora_" not in full:
            name = unwrapped(full)
            alias[name] = first.setdefault(id(parameter), name)
            if alias[name] == name:
                shapes[name] = shape
            if parameter.requires_grad:
                trained.add(name)
    for name, module in base.named_modules():
        trained.update(_adapted(unwrapped(name), module))
        if hasattr(module, "held"):  # FP8, which is no parameter
            name = f"{unwrapped(name)}.weight"
            shapes[name] = (module.out_features, module.in_features)
            alias[name] = name
    for name in trained:
        if name in alias:  # a tied head that trains apart from the embedding counts as a matrix of its own
            shapes.setdefault(name, shapes[alias[name]])
    own_rows = {alias.get(name, name): count for name, count in rows.items()}
    return _counted(shapes, kinds_of(shapes, embedding=embedding, head=head), trained, own_rows)


def _counted(shapes: Shapes, kinds: Mapping[str, str], trained: set[str], rows: Mapping[str, int]) -> TrainedParts:
    total: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    for name, shape in shapes.items():
        total[kinds[name]] += prod(shape)
        counted[kinds[name]] += prod(shape) if name in trained else rows.get(name, 0)
    return TrainedParts(total, counted)


def _adapted(name: str, module: Any) -> Iterator[str]:
    """The parameters that an adapter layer changes, or whose sum with its update changes."""
    if hasattr(module, "parameter_name"):
        yield f"{name}.{module.parameter_name}"
    elif hasattr(module, "lora_A"):
        yield from (f"{name}.weight", f"{name}.bias")


def unwrapped(name: str) -> str:
    """The name of a module or tensor without peft's wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
