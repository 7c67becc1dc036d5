"""Which layers of a model LoRA adapts, by the options of its section, and what it leaves out and why.

A name in an option matches the module of that full name, and every module whose name ends in `.name`.
"""

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ft_dist.errors import ModelError

if TYPE_CHECKING:
    from ft_dist.model.parts.layers import Layers

ALL_LINEAR = "all-linear"
# the names that peft turns into those of stacked matrices, where it adapts experts
_OLD_EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
# old name: the stacked matrix, and the other half in it
_STACKED = {
    "gate_proj": ("gate_up_proj", "up_proj"),
    "up_proj": ("gate_up_proj", "gate_proj"),
    "w1": ("gate_up_proj", "w3"),
    "w3": ("gate_up_proj", "w1"),
    "w2": ("down_proj", None),
}

_NOT_PLAIN = "method.dropout and method.dora cannot be used there"


@dataclass(frozen=True)
class Wanted:
    """The options that choose layers."""

    targets: str | Sequence[str]
    exclude: Sequence[str] = ()
    layers: Collection[int] | None = None
    whole: Sequence[str] = ()
    """Modules trained whole"""
    plain: bool = True
    """Without dropout and DoRA, which peft cannot apply to a parameter"""


@dataclass
class Choice:
    """`modules` and `parameters` get adapters, `whole` modules train themselves; `notes` are for the user."""

    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose(layers: "Layers", wanted: Wanted) -> Choice:
    """Raises ModelError for an option that matches nothing, or only layers that cannot be adapted."""
    _refuse_other_parts(layers, wanted)
    choice = Choice(whole=match_whole(layers.modules, wanted.whole))
    named = _named(layers, wanted.targets)
    # what the other parts of a multimodal model have is excluded anyway
    excluded = set(match("exclude_modules", [*layers.modules, *layers.other_parts], wanted.exclude))
    check_layers([*layers.linears, *layers.experts], wanted.layers)

    out = excluded | set(choice.whole)

    def kept(name: str) -> bool:
        return out.isdisjoint(around(name)) and in_layers(name, wanted.targets, wanted.layers)

    left: dict[str, list[str]] = {}
    experts = [name for name in _experts(layers, wanted.targets) if kept(name)]
    for name in filter(kept, named):
        reason = layers.unfit.get(name)
        leaf = name.rpartition(".")[2]
        linear = name in layers.linears or name in layers.router_linears or name == layers.head
        if reason is None and linear and not (layers.adapts_experts and leaf in _OLD_EXPERT_NAMES):
            choice.modules.append(name)
        elif reason is None and wanted.plain:
            choice.parameters.append(f"{name}.weight")
        else:
            hint = "; method.modules_to_save trains it whole" if name in layers.routers else ""
            left.setdefault((reason or _NOT_PLAIN) + hint, []).append(name)
    if layers.adapts_experts and wanted.plain:
        choice.parameters += [name for name in experts if not name.endswith("_bias")]
    elif experts:
        choice.notes.append(_experts_left(layers, tuple(experts), wanted))
    option = f"method.target_modules={_joined(wanted.targets)}"
    choice.notes += [f"{option}: {_summary(names)} left out: {reason}" for reason, names in left.items()]
    choice.notes += partial_matches(layers, wanted)
    if not choice.modules and not choice.parameters:
        why = "; ".join(choice.notes) or "the other options of method leave none of its layers"
        raise ModelError(f"{option}: nothing to adapt ({why}). Change these options.")
    return choice


def in_layers(name: str, targets: str | Sequence[str], layers: Collection[int] | None) -> bool:
    """Whether method.layers_to_transform keeps a layer that `targets` chose: the head, if named, is in no layer."""
    number = layer_of(name)
    return layers is None or number in layers or (number is None and targets != ALL_LINEAR)


def _refuse_other_parts(layers: "Layers", wanted: Wanted) -> None:
    """Raise ModelError for a name that only the other parts of a multimodal model have."""
    for option, names in (("target_modules", _listed(wanted.targets)), ("modules_to_save", wanted.whole)):
        for target in names:
            found = [name for name in layers.other_parts if _matches(name, target)]
            if found and not any(_matches(name, target) for name in layers.modules):
                raise ModelError(
                    f"method.{option}={target}: only parts that do not train have it, such as {found[0]}. Of a "
                    "multimodal model, only the text model trains; name layers of it."
                )


def _experts_left(layers: "Layers", experts: tuple[str, ...], wanted: Wanted) -> str:
    why = _NOT_PLAIN if layers.adapts_experts else "adapters on experts of this architecture do not exist yet"
    in_attention = any("attention" in name or "attn" in name for name in experts)
    return (
        f"method.target_modules={_joined(wanted.targets)}: the experts, {layers.share(experts):.1%} of the model's "
        f"parameters{' and part of its attention' if in_attention else ''}, are left out: {why}"
    )


def _named(layers: "Layers", targets: str | Sequence[str]) -> list[str]:
    """The linear layers and routers that `targets` names, or the head; `all-linear` names neither head nor routers."""
    if targets == ALL_LINEAR:
        return list(layers.linears)
    names = list(dict.fromkeys([*layers.linears, *layers.routers, layers.head]))
    listed = _listed(targets)
    for target in listed:
        if any(_matches(name, target) for name in names) or _experts(layers, listed, only=target):
            continue
        if _matches(layers.embedding, target):
            raise ModelError(
                f"method.target_modules={target}: the embedding is not a linear layer. Train it whole with "
                f"method.modules_to_save=[{target}], or only the rows of new tokens with model.new_tokens."
            )
        if target in _STACKED and _experts(layers, [target, _STACKED[target][1] or target]):
            raise ModelError(
                f"method.target_modules={target}: the experts store it in one matrix with {_STACKED[target][1]}. Name "
                "both."
            )
        raise ModelError(_no_match("target_modules", target, layers.linears, "linear layer"))
    return [name for name in names if any(_matches(name, target) for target in listed)]


def _experts(layers: "Layers", targets: str | Sequence[str], *, only: str | None = None) -> list[str]:
    """The experts' parameters that `targets` names, by their own names or those of their halves (`gate_proj`); with
    `only`, those that this target of them names."""
    if targets == ALL_LINEAR:
        return list(layers.experts)
    listed = _listed(targets)
    chosen = listed if only is None else [only]
    stacked = {_STACKED[name][0] for name in chosen if name in _STACKED and (_STACKED[name][1] or name) in listed}
    ends = tuple(f".{target}" for target in chosen)
    found = []
    for name in layers.experts:
        # the matrix, the module that holds it, and the list that holds such modules
        outer = around(name.removesuffix(".weight"))[-3:]
        if any(part in chosen or part.endswith(ends) for part in outer) or outer[-1].rpartition(".")[2] in stacked:
            found.append(name)
    return found


def match(option: str, names: Iterable[str], wanted: Sequence[str], what: str = "module") -> list[str]:
    """The `names` that `wanted` matches. Raises ModelError for one that matches nothing."""
    names = list(names)
    for target in wanted:
        if not any(_matches(name, target) for name in names):
            raise ModelError(_no_match(option, target, names, what))
    return [name for name in names if any(_matches(name, target) for target in wanted)]


def match_whole(modules: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """The modules that method.modules_to_save names, without those inside another one."""
    found = match("modules_to_save", modules, wanted)
    every = set(found)
    return [name for name in found if every.isdisjoint(around(name)[:-1])]


def match_target_modules(names: Iterable[str], targets: str | Sequence[str], *, strict: bool = True) -> list[str]:
    """The linear layers among `names` that `targets` matches; `all-linear` matches all.

    Raises ModelError for a target that matches nothing, unless the `names` are only assumed, so not `strict`.
    """
    names = list(names)
    if targets == ALL_LINEAR:
        return names
    if not strict:
        return [name for name in names if any(_matches(name, target) for target in _listed(targets))]
    return match("target_modules", names, _listed(targets), "linear layer")


def check_layers(names: Iterable[str], layers: Collection[int] | None) -> None:
    """Raise ModelError if `layers` has a number that no layer of the model has."""
    numbers = {number for name in names if (number := layer_of(name)) is not None}
    for number in layers or ():
        if number not in numbers:
            raise ModelError(
                f"method.layers_to_transform={number}: the model's layers are numbered 0 to {max(numbers, default=0)}."
            )


def layer_of(name: str) -> int | None:
    """The number of the layer that a module is in: the first number in its name."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def partial_matches(layers: "Layers", wanted: Wanted) -> list[str]:
    """One line per target that some of the model's layers have and others lack."""
    if wanted.targets == ALL_LINEAR:
        return []
    names = [*layers.linears, *layers.routers, *layers.experts]
    every = {number for name in names if (number := layer_of(name)) is not None}
    lines = []
    for target in _listed(wanted.targets):
        found = [name for name in (*layers.linears, *layers.routers) if _matches(name, target)]
        found += _experts(layers, _listed(wanted.targets), only=target)
        held = {number for name in found if (number := layer_of(name)) is not None}
        # a full name is meant for one layer
        if held and held != every and layer_of(target) is None and layer_of(f".{target}.") is None:
            lines.append(f"method.target_modules={target}: matches {len(held)} of {len(every)} layers")
    return lines


def around(name: str) -> list[str]:
    """The modules around `name`, outermost first, and itself."""
    path = name.split(".")
    return [".".join(path[:end]) for end in range(1, len(path) + 1)]


def _no_match(option: str, target: str, names: Iterable[str], what: str) -> str:
    names = list(names)
    leaves = sorted({leaf for name in names if not (leaf := name.rpartition(".")[2]).isdigit()})
    near = difflib.get_close_matches(target, [*leaves, *names], n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    end = "; all-linear adapts all of them." if option == "target_modules" else "."
    return f"method.{option}={target}: matches no {what} of this model. {hint}It has {', '.join(leaves)}{end}"


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _listed(targets: str | Sequence[str]) -> list[str]:
    return [targets] if isinstance(targets, str) else list(targets)


def _joined(targets: str | Sequence[str]) -> str:
    return ",".join(_listed(targets))


def _summary(names: Iterable[str]) -> str:
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{count} x {leaf}" if count > 1 else leaf for leaf, count in counts.items())
