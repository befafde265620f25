"""Nodes whose value another node has already."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from dropsurgery.graph.affine import argument, identity_input
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.leaves import has_hooks
from dropsurgery.graph.module import called_module
from dropsurgery.graph.purity import is_surely_floating


@dataclass(frozen=True)
class NoOp:
    """A node that gives the value of another.

    Attributes:
        source: the other node.
        what: what the node does, for people.
        copies: whether its value is a copy, which could be written to without the other changing.
    """

    source: fx.Node
    what: str
    copies: bool = False


def no_op(module: fx.GraphModule, shapes: Shapes, node: fx.Node) -> NoOp | None:
    """Return the node whose value this one repeats, where that is proved.

    - identities: `nn.Identity`, drop layers in eval mode;
    - x·1, x/1, x + 0, x - 0, x¹ with a Python number, where it cannot change the dtype: a tensor of
      zeros or ones may broadcast, and integers become floating by division or by a float;
    - two permutations or transpositions that cancel, unsqueeze and squeeze of one axis, a
      permutation that moves nothing, flatten(1) of two axes;
    - a cast to the value's own dtype or device, as `x.to(x.dtype)`, or to one it was just cast to;
      `contiguous()` twice;
    - pooling over windows of one entry; padding by nothing.
    """
    called = called_module(module, node)
    same = identity_input(node, called)
    if same is not None:
        return NoOp(same, "is the identity in eval mode")
    if called is not None:
        return None if has_hooks(called) else _module(shapes, node, called)
    if node.op not in ("call_function", "call_method"):
        return None
    name = getattr(node.target, "__name__", str(node.target))
    return _arithmetic(module, node, name) or _view(shapes, node, name) or _cast(node, name)


def _module(shapes: Shapes, node: fx.Node, called: nn.Module) -> NoOp | None:
    source = argument(node, 0, "input")
    if not isinstance(source, fx.Node):
        return None
    state: Any = called
    if type(called) in _POOLS:
        window = (state.kernel_size, state.stride, state.padding)
        if _all(window[0], 1) and _all(window[1], 1) and _all(window[2], 0):
            counts = getattr(called, "divisor_override", None) in (None, 1)
            if counts and not getattr(called, "return_indices", False):
                return NoOp(source, "pools over windows of one entry", copies=True)
    if type(called) in _PADS and _all(state.padding, 0):
        return NoOp(source, "pads by nothing", copies=True)
    if type(called) is nn.Flatten and state.start_dim == 1 and state.end_dim in (-1, 1):
        return NoOp(source, "flattens one axis") if shapes.rank(source) == 2 else None
    return None


_POOLS = frozenset(
    {nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d}
)
_PADS = frozenset({nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d})


def _all(value: Any, expected: int) -> bool:
    values = value if isinstance(value, tuple | list) else (value,)
    return bool(values) and all(type(item) is int and item == expected for item in values)


_NEUTRAL = {
    "mul": 1, "mul_": 1, "imul": 1, "truediv": 1, "div": 1, "div_": 1, "add": 0, "add_": 0,
    "iadd": 0, "sub": 0, "sub_": 0, "isub": 0, "pow": 1,
}  # fmt: skip


def _arithmetic(module: fx.GraphModule, node: fx.Node, name: str) -> NoOp | None:
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    if name not in _NEUTRAL or not set(node.kwargs) <= {"input", "other"} or len(node.args) > 2:
        return None
    neutral = _NEUTRAL[name]
    source, number = left, right
    if name in ("mul", "imul", "add", "iadd") and not isinstance(left, fx.Node):
        source, number = right, left
    plain = isinstance(number, int | float) and not isinstance(number, bool)
    if not isinstance(source, fx.Node) or not plain or number != neutral:
        return None
    in_place = name.endswith("_")
    if not in_place and not is_surely_floating(module, source):
        return None
    return NoOp(source, f"computes {name.strip('_')} with {number}", copies=not in_place)


def _view(shapes: Shapes, node: fx.Node, name: str) -> NoOp | None:
    source = argument(node, 0, "input")
    if not isinstance(source, fx.Node) or node.target is operator.getitem:
        return None
    order = _order(node, name)
    if order is not None:
        if order == tuple(range(len(order))):
            return NoOp(source, "permutes nothing")
        before = _order(source, _name(source))
        inner = argument(source, 0, "input")
        cancels = before is not None and [before[axis] for axis in order] == [*range(len(order))]
        if cancels and isinstance(inner, fx.Node):
            return NoOp(inner, f"undoes '{source.name}'")
        return None
    ends = _ends(node, name)
    inner = argument(source, 0, "input")
    if not isinstance(inner, fx.Node):
        inner = source
    if ends is not None and ends == _ends(source, _name(source)):
        return NoOp(inner, f"undoes '{source.name}'")
    axis = argument(node, 1, "dim")
    if name == "squeeze" and type(axis) is int and _name(source) == "unsqueeze":
        return (
            NoOp(inner, f"undoes '{source.name}'") if argument(source, 1, "dim") == axis else None
        )
    if name == "flatten" and argument(node, 1, "start_dim", 0) == 1:
        last = argument(node, 2, "end_dim", -1) in (-1, 1)
        return NoOp(source, "flattens one axis") if last and shapes.rank(source) == 2 else None
    return None


def _name(node: fx.Node) -> str:
    is_call = node.op in ("call_function", "call_method")
    return getattr(node.target, "__name__", str(node.target)) if is_call else ""


def _order(node: fx.Node, name: str) -> tuple[int, ...] | None:
    """Return the order of axes of a permutation, where it is written down."""
    if name != "permute":
        return None
    rest = node.args[1:] or (node.kwargs.get("dims"),)
    order: Any = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    if not all(type(axis) is int for axis in order):
        return None
    return tuple(axis % len(order) for axis in order)


def _ends(node: fx.Node, name: str) -> frozenset[int] | None:
    """Return the axes that a transposition swaps, where they are written down."""
    if name not in ("transpose", "swapaxes"):
        return None
    ends = (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
    return frozenset(ends) if all(type(end) is int for end in ends) else None


_CASTS = frozenset({"float", "half", "bfloat16", "double", "long", "int"})


def _cast(node: fx.Node, name: str) -> NoOp | None:
    source = argument(node, 0, "input")
    if node.op != "call_method" or not isinstance(source, fx.Node):
        return None
    if name in _CASTS or name == "contiguous":
        same = source.op == "call_method" and source.target == name
        plain = len(node.args) == 1 and not node.kwargs and len(source.args) == 1
        return NoOp(source, f"repeats '{source.name}'") if same and plain else None
    if name == "type_as" and argument(node, 1, "other") is source:
        return NoOp(source, "casts a value to its own dtype")
    if name == "to" and len(node.args) == 2 and not node.kwargs:
        asked: Any = node.args[1]
        own = isinstance(asked, fx.Node) and asked.target is getattr and asked.args[0] is source
        if own and asked.args[1] in ("dtype", "device"):
            return NoOp(source, f"casts a value to its own {asked.args[1]}")
        twice = source.op == "call_method" and source.target == "to"
        if twice and isinstance(asked, torch.dtype) and source.args[1:] == (asked,):
            return NoOp(source, f"repeats '{source.name}'") if not source.kwargs else None
    return None
