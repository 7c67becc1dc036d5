"""Damage to files that a fuzzer applies: flipped bits, cuts, repeats, and JSON values of other types or sizes."""

import copy
from typing import Any

from hypothesis import strategies as st

ODD_VALUES = [
    None, True, -1, 0, 1, 2, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308,
    "", "..", "../../x", "/etc/passwd", "a/b", "x" * 300, "\0", "é", "\ud800", float("inf"), float("nan"),
    "a\nb", "\udc80",    [], {}, [[]], [1] * 50, {"a": 1},
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a valid file after one to three random changes."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "byte"]))
        at = draw(st.integers(0, max(0, len(found) - 1)))
        if kind == "flip" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and found:
            found[at] = draw(st.sampled_from([0, 0x0A, 0x22, 0x5B, 0x7B, 0x80, 0xFF]))
        elif kind == "cut":
            del found[at : at + draw(st.sampled_from([1, 8, 64, len(found)]))]
        elif kind == "insert":
            found[at:at] = draw(st.binary(max_size=16) | st.sampled_from([b"[" * 2000, b"9" * 5000, b'{"a":' * 2000]))
        else:
            found[at:at] = found[at : at + draw(st.sampled_from([1, 8, 64, len(found)]))]
    return bytes(found)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@st.composite
def altered(draw: st.DrawFn, tree: Any) -> Any:
    """A JSON tree with one to three values removed, replaced or moved by a little."""
    found = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(found)))
        if not path:
            continue
        holder = found
        for key in path[:-1]:
            holder = holder[key]
        old = holder[path[-1]]
        kind = draw(st.sampled_from(["remove", "replace", "shift"]))
        if kind == "remove":
            del holder[path[-1]]
        elif kind == "shift" and type(old) is int:
            holder[path[-1]] = old + draw(st.sampled_from([-8, -1, 1, 8, 2**20]))
        else:
            holder[path[-1]] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
    return found
