"""Changes to valid JSON trees and files."""

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

ODD = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            -1,
            0,
            2**31,
            2**63,
            10**400,
            1e308,
            float("inf"),
            float("nan"),
            "",
            "a\nb",
            "\udc80",
            "x" * 10_000,
        ]
    ),
    st.sampled_from([[], {}, [[]], {"": {}}, [None], "../../x", "/x", "1", [1] * 1000]),
    st.integers(-(2**70), 2**70),
    st.text(max_size=20),
)


DEEPEST = 10


def paths(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a tree, the root included, down to some depth."""
    if len(at) == DEEPEST:
        return [at]
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at, *(path for key, value in children for path in paths(value, (*at, key)))]


@st.composite
def changed_trees(draw: Callable[..., Any], tree: Any) -> Any:
    """The tree with one to three values replaced, removed, duplicated or nested deeply."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(tree)))
        if not path:
            if draw(st.booleans()):
                continue
            return copy.deepcopy(draw(ODD))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "remove", "nest", "rename"]))
        if kind == "remove":
            del parent[path[-1]]
        elif kind == "nest":
            for _ in range(draw(st.sampled_from([1, 500]))):
                parent[path[-1]] = [parent[path[-1]]]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=10))] = parent.pop(path[-1])
        else:
            parent[path[-1]] = copy.deepcopy(draw(ODD))
    return tree


@st.composite
def changed_bytes(draw: Callable[..., Any], content: bytes) -> bytes:
    """The file with flipped bits, cut short, extended or with a part repeated."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "overwrite"]))
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[at:]
        elif kind == "insert":
            changed[at:at] = draw(st.binary(max_size=20))
        else:
            piece = draw(st.binary(min_size=1, max_size=9))
            changed[at : at + len(piece)] = piece
    return bytes(changed)
