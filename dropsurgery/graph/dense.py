"""Layout in memory, where taking an operation out would let it be seen."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from dropsurgery.graph.channels import moves_axes
from dropsurgery.graph.uses import value_readers

# Methods that look at strides: they raise an error where a value is not dense enough.
_STRICT = frozenset({"view", "view_as", "as_strided", "stride", "is_contiguous", "unflatten"})
# What makes a value dense again, whatever it reads.
_DENSE = frozenset({"contiguous", "reshape", "clone"})


def needs_dense(node: fx.Node, data: fx.Node) -> bool:
    """Say whether a node's output has to be contiguous, and its input may not be.

    A BatchNorm's output is contiguous whatever its input's strides are; a `view` behind it may
    rely on that. Strides are handed on by elementwise operations, so that anything which is not
    known to make a new layout is taken to hand them on.
    """
    return _is_moved(data) and _is_viewed(node)


def _is_moved(data: fx.Node) -> bool:
    seen, stack = set[fx.Node](), [data]
    while stack:
        node = stack.pop()
        if node in seen or node.target in _DENSE or node.op in ("placeholder", "get_attr"):
            continue
        seen.add(node)
        if moves_axes(node):
            return True
        stack += node.all_input_nodes[: 2 if node.op == "call_function" else 1]
    return False


def _is_viewed(node: fx.Node) -> bool:
    seen, stack = set[fx.Node](), [node]
    while stack:
        current = stack.pop()
        for user in value_readers(current):
            if user.op == "call_method" and user.target in _STRICT:
                return True
            if user not in seen and user.target not in _DENSE:
                seen.add(user)
                stack.append(user)
    return False


def can_be_plain(node: fx.Node, called: nn.Module | None) -> bool:
    """Say whether an operation that writes in place can be told not to."""
    if called is not None:
        return any(getattr(layer, "inplace", False) for layer in called.modules())
    return node.kwargs.get("inplace") is True


def make_plain(node: fx.Node, called: Any) -> None:
    """Let an operation return a new value in place of writing into its operand."""
    if called is None:
        node.update_kwarg("inplace", False)
        return
    for layer in called.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False
