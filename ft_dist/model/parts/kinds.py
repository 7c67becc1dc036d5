"""The kind of part that each parameter of a model belongs to. Torch-free.

Structure decides first: experts are stacked matrices, and a router is their neighbour with one row per expert.
Names decide the rest, and what they leave open is `other` (recurrent layers, convolutions).
"""

from collections import defaultdict
from collections.abc import Mapping

ATTENTION, MLP, EXPERTS, ROUTER = "attention", "MLP", "experts", "router"
EMBEDDINGS, HEAD, NORMS, OTHER = "embeddings", "head", "norms", "other"
KINDS = (ATTENTION, MLP, EXPERTS, ROUTER, EMBEDDINGS, HEAD, NORMS, OTHER)

Shapes = Mapping[str, tuple[int, ...]]

_RECURRENT = ("mamba", "linear_attn", "ssm", "conv", "delta", "rwkv")
_MLP_WORDS = ("mlp", "feed_forward", "ffn", "shared_expert")
_ATTENTION_MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"}
_MLP_MATRICES = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2"}
_ROUTER_NAMES = {"gate", "wg"}


def kinds_of(shapes: Shapes, *, embedding: str = "", head: str = "lm_head") -> dict[str, str]:
    """The kind of every parameter of a model; `embedding` and `head` are the names of its modules."""
    experts = {name for name, shape in shapes.items() if _is_expert(name, shape)}
    routers = _routers(shapes, experts)
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


def _is_expert(name: str, shape: tuple[int, ...]) -> bool:
    path = name.split(".")[:-1]
    stacked = len(shape) == 3 and min(shape) > 1 and not any("conv" in part for part in path)
    return stacked or "experts" in path


def _routers(shapes: Shapes, experts: set[str]) -> set[str]:
    """The parameters of the experts' sibling modules in which every matrix has one dimension per expert."""
    counts: dict[str, int] = {}
    for name in experts:
        path = name.split(".")
        at = path.index("experts") if "experts" in path else len(path) - 2
        number = path[at + 1]
        count = int(number) + 1 if number.isdigit() else shapes[name][0]
        parent = ".".join(path[:at])
        counts[parent] = max(counts.get(parent, 0), count)
    siblings: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in shapes.keys() - experts if counts else ():
        path = name.split(".")
        for depth in range(len(path) - 1):
            if (parent := ".".join(path[:depth])) in counts:
                siblings[parent, path[depth]].append(name)
    found: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for (parent, child), names in siblings.items():
        matrices = [shapes[name] for name in names if len(shapes[name]) > 1]
        if matrices and all(counts[parent] in shape for shape in matrices):
            found[parent][child] = names
    routers: set[str] = set()
    for children in found.values():
        # another small layer may happen to have as many rows as there are experts
        named = [child for child in children if "router" in child or child in _ROUTER_NAMES]
        for child in named or children:
            routers.update(children[child])
    return routers


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
