"""Values of a graph that the network's input does not change."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropsurgery.graph.affine import fetch

_METHODS = frozenset(
    {"reshape", "view", "unsqueeze", "squeeze", "permute", "transpose", "flatten", "contiguous"}
)
_FUNCTIONS = frozenset(
    {torch.reshape, torch.unsqueeze, torch.squeeze, torch.permute, torch.transpose, torch.flatten,
     operator.getitem}
)  # fmt: skip


def constant(root: nn.Module, value: Any) -> Tensor | None:
    """Return a Python number, a parameter, a buffer or a view of one; None for anything else.

    Args:
        root: the module whose paths the graph's nodes name.
        value: an argument of a node.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        found = fetch(root, str(value.target))
        return found.detach() if isinstance(found, Tensor) else None
    known = value.target in (_METHODS if value.op == "call_method" else _FUNCTIONS)
    if not known or value.op not in ("call_method", "call_function"):
        return None
    if not value.args or value.all_input_nodes != [value.args[0]]:
        return None
    source = constant(root, value.args[0])
    if source is None:
        return None
    function: Any = (
        getattr(source, str(value.target)) if value.op == "call_method" else value.target
    )
    arguments = value.args[1:] if value.op == "call_method" else (source, *value.args[1:])
    return function(*arguments, **value.kwargs)
