"""The kind of part that each parameter of a model belongs to. Torch-free.

Structure decides first: experts are stacked matrices with a router, a neighbour that has one row per expert.
Names decide the rest, and what they leave open is `other` (recurrent layers, convolutions).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

ATTENTION, MLP, EXPERTS, ROUTER = "attention", "MLP", "experts", "router"
EMBEDDINGS, HEAD, NORMS, OTHER = "embeddings", "head", "norms", "other"
KINDS = (ATTENTION, MLP, EXPERTS, ROUTER, EMBEDDINGS, HEAD, NORMS, OTHER)

Shapes = Mapping[str, tuple[int, ...]]

_RECURRENT = ("mamba", "linear_attn", "ssm", "conv", "delta", "rwkv")
_MLP_WORDS = ("mlp", "feed_forward", "ffn", "shared_expert")
_ATTENTION_MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"}
_MLP_MATRICES = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2"}
_ROUTER_NAMES = {"gate", "gating", "wg"}
_LEVELS = 3
"""How far above a stack its router's module may be: `mlp.experts.w1.weight` and `mlp.gate.weight`"""


def kinds_of(shapes: Shapes, *, embedding: str = "", head: str = "lm_head") -> dict[str, str]:
    """The kind of every parameter of a model; `embedding` and `head` are the names of its modules."""
    experts, routers = _mixtures(shapes)
    kinds = {}
    for name, shape in shapes.items():
        module = name.rpartition(".")[0]
        if name in experts:
            kinds[name] = EXPERTS
        elif name in routers:
            kinds[name] = ROUTER
        elif module == head:
            kinds[name] = HEAD
        elif module == embedding:
            kinds[name] = EMBEDDINGS
        else:
            kinds[name] = _by_name(module, shape)
    return kinds


@dataclass(frozen=True)
class _Stack:
    """Matrices of several experts, all in one parameter or in a module called `experts`; `count` is 0 if unknown."""

    path: tuple[str, ...]
    names: tuple[str, ...]
    count: int
    widths: frozenset[int]


def _mixtures(shapes: Shapes) -> tuple[set[str], set[str]]:
    """The parameters of experts, and those of the routers that choose among them.

    A stack of matrices is one of experts if a router of its size is near, or if it is called `experts`.
    """
    experts: set[str] = set()
    routers: set[str] = set()
    stacks = _stacks(shapes)
    modules = _children(shapes) if stacks else {}
    stacked = {name for stack in stacks for name in stack.names}
    for stack in stacks:
        if stack.count and "experts" in stack.path:
            experts.update(stack.names)
        for depth in range(len(stack.path) - 1, max(0, len(stack.path) - 1 - _LEVELS), -1):
            children = modules[stack.path[:depth]]
            siblings = {child: names for child, names in children.items() if stacked.isdisjoint(names)}
            if found := _routers(shapes, siblings, stack):
                routers.update(found)
                experts.update(children.get(stack.path[depth], stack.names))
                break
    return experts - routers, routers


def _stacks(shapes: Shapes) -> list[_Stack]:
    found = []
    listed: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        path = tuple(name.split("."))
        if len(shape) == 3 and min(shape) > 1 and not any("conv" in part for part in path[:-1]):
            found.append(_Stack(path, (name,), shape[0], frozenset(shape[1:])))
        elif "experts" in path[:-1]:
            listed[path[: path.index("experts") + 1]].append(name)
    whole = {stack.path[: stack.path.index("experts") + 1] for stack in found if "experts" in stack.path}
    for path, names in listed.items():
        if path in whole:  # biases of the stacks
            continue
        numbers = {part for name in names if (part := name.split(".")[len(path)]).isdigit()}
        widths = frozenset(size for name in names if len(shapes[name]) == 2 for size in shapes[name])
        found.append(_Stack(path, tuple(names), len(numbers), widths))
    return found


def _children(shapes: Shapes) -> dict[tuple[str, ...], dict[str, list[str]]]:
    """The parameters in each child module of each module."""
    children: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in shapes:
        path = tuple(name.split("."))
        for depth in range(len(path) - 1):
            children[path[:depth]][path[depth]].append(name)
    return children


def _routers(shapes: Shapes, children: Mapping[str, list[str]], stack: _Stack) -> list[str]:
    """The parameters of those child modules that choose among the stack's experts.

    By name, a module with a row per expert (and per shared one, in some models). Else one with nothing but such rows.
    """
    named, others = [], []
    for child, names in children.items():
        matrices = [shapes[name] for name in names if len(shapes[name]) == 2]
        if "router" in child or child in _ROUTER_NAMES:
            if any(_chooses(rows, width, stack) or _chooses(width, rows, stack) for rows, width in matrices):
                named += names
        elif len(matrices) == 1 and matrices[0][0] == stack.count < matrices[0][1] and matrices[0][1] in stack.widths:
            others += names
    return named or others


def _chooses(rows: int, width: int, stack: _Stack) -> bool:
    return not stack.count or (stack.count <= rows <= 2 * stack.count and width in stack.widths)


def _by_name(module: str, shape: tuple[int, ...]) -> str:
    path = module.lower().split(".")
    leaf = path[-1]
    if len(shape) < 2 and ("norm" in leaf or leaf.startswith("ln_")):
        return NORMS
    if "embed" in leaf or leaf in ("wte", "wpe"):
        return EMBEDDINGS
    if "router" in path:
        return ROUTER
    if any(word in part for part in path for word in _RECURRENT):
        return OTHER
    if leaf in _ATTENTION_MATRICES or any("attn" in part or "attention" in part for part in path):
        return ATTENTION
    if leaf in _MLP_MATRICES or any(word in part for part in path for word in _MLP_WORDS):
        return MLP
    return OTHER
