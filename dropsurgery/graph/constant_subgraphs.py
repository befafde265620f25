"""Parts of a graph that no input changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from dropsurgery.graph.affine import fetch
from dropsurgery.graph.memory import Memory
from dropsurgery.graph.module import called_module
from dropsurgery.graph.ops import Kind, kind_of
from dropsurgery.graph.purity import is_pure

# What costs nothing while the network runs.
_FREE = frozenset({Kind.ALIAS, Kind.SLICE, Kind.ITEM, Kind.SPLIT, Kind.SHAPE})
_GATHERS = frozenset({"index_select", torch.index_select})


class ConstantSubgraphs:
    """Finds the nodes whose value depends on parameters, buffers and numbers alone.

    Args:
        module: the traced module.
        graph: one of its graphs, or a copy of one.
        memory: which of its values share memory.
    """

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, memory: Memory) -> None:
        self.module = module
        written = {value for write in memory.writes for value in memory.group(write)}
        self.nodes: dict[fx.Node, None] = {}
        for node in graph.nodes:
            known = all(value in self.nodes for value in node.all_input_nodes)
            if node.op in ("placeholder", "output") or not known or node in written:
                continue
            on_device = node.kwargs.get("device") is not None
            if is_pure(module, node) and not on_device:
                self.nodes[node] = None

    def worth_storing(self, limit: int) -> Iterator[tuple[fx.Node, Tensor]]:
        """Yield nodes that others compute with, with their values, where storing them pays.

        Left out are views of parameters, which cost nothing; what is returned by the network; and
        values of more than `limit` entries that are larger than what they are computed from.
        """
        for node in self.nodes:
            users = [user for user in node.users if user not in self.nodes]
            if not users or not node.op.startswith("call_"):
                continue
            if any(user.op == "output" for user in users) or self._is_free(node):
                continue
            value = self.value(self.module, node)
            if isinstance(value, Tensor):
                parts = {id(t): t.numel() for t in self._tensors(node)}
                if value.numel() <= max(limit, sum(parts.values())):
                    yield node, value

    def _upstream(self, node: fx.Node) -> Iterator[fx.Node]:
        seen, waiting = {node}, [node]
        while waiting:
            value = waiting.pop()
            yield value
            waiting += [v for v in value.all_input_nodes if v not in seen]
            seen.update(value.all_input_nodes)

    def _is_free(self, node: fx.Node) -> bool:
        for value in self._upstream(node):
            # An index that is a tensor gathers, which copies.
            gathers = len(value.all_input_nodes) > 1 or value.target in _GATHERS
            free = kind_of(self.module, value) in _FREE and not gathers
            if value.op != "get_attr" and not free:
                return False
        return True

    def _tensors(self, node: fx.Node) -> Iterator[Tensor]:
        """Yield the tensors that a node's value is computed from."""
        for value in self._upstream(node):
            if value.op == "get_attr":
                found = fetch(self.module, str(value.target))
                if isinstance(found, Tensor):
                    yield found
            called = called_module(self.module, value)
            if called is not None:
                yield from called.parameters()

    @staticmethod
    def value(module: fx.GraphModule, node: fx.Node) -> Any:
        """Compute a node that depends on no input; None where that fails."""
        values: dict[fx.Node, Any] = {}

        def compute(current: fx.Node) -> Any:
            if current not in values:
                args, kwargs = fx.node.map_arg((current.args, current.kwargs), compute)
                values[current] = _run(module, current, args, dict(kwargs))
            return values[current]

        with torch.no_grad():
            found = compute(node)
        return found.detach().clone() if isinstance(found, Tensor) else found


def _run(module: fx.GraphModule, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
    if node.op == "get_attr":
        return fetch(module, str(node.target))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    called = called_module(module, node)
    function: Any = node.target if called is None else called
    return function(*args, **kwargs)
