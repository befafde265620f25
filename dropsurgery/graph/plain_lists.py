"""Functions of a network that write into lists which the graph keeps."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from dropsurgery.graph.shapes import plain


def with_plain_lists(module: nn.Module) -> nn.Module:
    """Return a network whose own functions get lists of their own, also from an interpreter.

    The code of a graph writes each list out anew; `fx.Interpreter`, which `torch.export` runs a
    graph with, hands over the graph's, which refuse to be written to (torchvision's video Swin
    fits its windows in place). A module without such a call is returned as it is.
    """
    if not isinstance(module, fx.GraphModule) or not any(map(_is_own, module.graph.nodes)):
        return module
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for node in graph.nodes:
        if _is_own(node):
            node.target = _plain_call(node.target)
    return fx.GraphModule(module, graph, type(module).__name__)


def _is_own(node: fx.Node) -> bool:
    """Say whether a node calls a function of the network's with a list."""
    if not isinstance(node.target, types.FunctionType):
        return False
    if node.target.__module__.partition(".")[0] == "torch":
        return False
    leaves = pytree.tree_leaves((node.args, node.kwargs), is_leaf=lambda v: isinstance(v, list))
    return any(isinstance(leaf, list) for leaf in leaves)


def _plain_call(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*plain(args), **plain(kwargs))

    return call
