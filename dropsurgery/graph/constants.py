"""Values of a graph that do not depend on its inputs."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from dropsurgery.graph.affine import Refused, fetch
from dropsurgery.graph.ops import Kind, kind_of, writes_in_place

# What is computed of parameters by itself: views, and arithmetic of them and numbers.
_PLAIN = frozenset({Kind.ALIAS, Kind.ADD, Kind.SUB, Kind.PRODUCT})


def constant(module: fx.GraphModule, operand: Any) -> Tensor | int | float | None:
    """Return the value of a number, a parameter or buffer, or what views and arithmetic make of it.

    Returns:
        The value; None where it depends on an input, or is computed in another way.
    """
    if isinstance(operand, int | float) and not isinstance(operand, bool):
        return operand
    if not isinstance(operand, fx.Node):
        return None
    try:
        value = _evaluate(module, operand)
    except Refused:
        return None
    return value if isinstance(value, Tensor | int | float) else None


def _evaluate(module: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "get_attr":
        value = fetch(module, str(node.target))
        return value.detach() if isinstance(value, Tensor) else value
    is_plain = node.op in ("call_function", "call_method") and kind_of(module, node) in _PLAIN
    if not is_plain or writes_in_place(module, node) or node.target is operator.matmul:
        raise Refused("it is computed in a way that is not followed")
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _evaluate(module, n))
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
