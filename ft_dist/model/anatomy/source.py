"""Which weights the code of a layer reads past the layers that hold them, where an adapter has no effect.

The code decides rather than a run of it: another machine may have the fused kernels that read weights, and a run that
resumes there must have the same adapters. Branches that the model's config turns off do not count.
"""

import ast
import inspect
import operator
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from torch import nn

_USES = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))")
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_CHANGING = ("training", "gradient_checkpointing")
"""Attributes of a layer that are not settings, though a config may have keys of these names"""


class _Read(NamedTuple):
    """Code that reads the weight of the layer `leaf`, inside `tests`: each with the branch that the code is in."""

    leaf: str
    tests: tuple[tuple[ast.expr, bool], ...] = ()


class _NoSettingError(Exception):
    """A test depends on more than the config."""


def reads_weight(parent: nn.Module, leaf: str, *, config: Any) -> bool:
    """Whether the code of the module `parent` uses `self.LEAF.weight` for more than its dtype, device or shape."""
    # finding a class in its file takes long
    if leaf not in _names(sys.modules[type(parent).__module__]):
        return False
    return any(
        all(_value(test, parent, config) in (branch, None) for test, branch in read.tests)
        for read in _reads(parent.__class__)
        if read.leaf == leaf
    )


@cache
def _names(module: Any) -> frozenset[str]:
    return frozenset(_USES.findall(_source(module)))


@cache
def _reads(parent: type) -> tuple[_Read, ...]:
    source = _source(parent)
    try:
        return tuple(_reads_in(ast.parse(textwrap.dedent(source)), ()))
    except SyntaxError:  # a string in it is indented less than the class
        return tuple(_Read(leaf) for leaf in _USES.findall(source))


def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return ""


def _reads_in(node: ast.AST, tests: tuple[tuple[ast.expr, bool], ...]) -> Iterator[_Read]:
    if isinstance(node, ast.If | ast.IfExp):
        yield from _reads_in(node.test, tests)
        for branch, part in ((True, node.body), (False, node.orelse)):
            nodes: list[Any] = part if isinstance(part, list) else [part]
            for each in nodes:
                yield from _reads_in(each, (*tests, (node.test, branch)))
        return
    if isinstance(node, ast.Attribute):
        if node.attr in ("dtype", "device", "shape") and _leaf(node.value):
            return
        if leaf := _leaf(node):
            yield _Read(leaf, tests)
    for child in ast.iter_child_nodes(node):
        yield from _reads_in(child, tests)


def _leaf(node: ast.AST) -> str | None:
    """LEAF of `self.LEAF.weight`."""
    match node:
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr=leaf), attr="weight"):
            return leaf
    return None


def _value(test: ast.expr, module: Any, config: Any) -> bool | None:
    """What a test gives with this config; None if it depends on anything else."""
    match test:
        case ast.BoolOp(op=op, values=parts):
            values = [_value(part, module, config) for part in parts]
            decisive = isinstance(op, ast.Or)
            return decisive if decisive in values else None if None in values else not decisive
        case ast.UnaryOp(op=ast.Not(), operand=part):
            value = _value(part, module, config)
            return None if value is None else not value
    try:
        match test:
            case ast.Compare(left=left, ops=[comparison], comparators=[right]) if type(comparison) in _COMPARISONS:
                compare = _COMPARISONS[type(comparison)]
                return bool(compare(_setting(left, module, config), _setting(right, module, config)))
        return bool(_setting(test, module, config))
    except (_NoSettingError, TypeError):
        return None


def _setting(node: ast.expr, module: Any, config: Any) -> Any:
    """The value of a constant, of `self.config.NAME`, or of `self.NAME` if the layer has it from its config."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr="config"), attr=name):
            holders = [getattr(module, "config", None)]
        case ast.Attribute(value=ast.Name(id="self"), attr=name) if name not in _CHANGING:
            holders = [module, config]
        case _:
            raise _NoSettingError
    if not all(hasattr(holder, name) for holder in holders):
        raise _NoSettingError
    value, *others = (getattr(holder, name) for holder in holders)
    if not (value is None or isinstance(value, int | float | str)) or others not in ([], [value]):
        raise _NoSettingError
    return value
