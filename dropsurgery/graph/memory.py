"""Which values of a graph may share memory, and which nodes write into it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import fx

from dropsurgery.graph.affine import fetch
from dropsurgery.graph.module import called_module
from dropsurgery.graph.ops import Kind, kind_of, writes_in_place

# Operations whose result may be a view of their first operand (or, in eval, that operand).
_MAY_ALIAS = frozenset({Kind.ALIAS, Kind.DROP, Kind.SLICE, Kind.ITEM, Kind.SPLIT})


class Memory:
    """Groups of values that may share memory.

    Args:
        module: the traced module.
        graph: one of its graphs; neither is changed.
        fresh: nodes that are known to leave their operands alone, and to return new values.
    """

    def __init__(
        self, module: fx.GraphModule, graph: fx.Graph, fresh: Collection[fx.Node] = ()
    ) -> None:
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        nodes = [node for node in graph.nodes if node not in fresh]
        self.writes = {node for node in nodes if _may_write(module, node)}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._members: dict[fx.Node, list[fx.Node]] = {}
        reads: dict[int, fx.Node] = {}
        for node in nodes:
            if node.op == "get_attr":
                self.join(node, reads.setdefault(id(fetch(module, str(node.target))), node))
            first = node.all_input_nodes[:1]
            if first and (node in self.writes or kind_of(module, node) in _MAY_ALIAS):
                self.join(node, first[0])

    def join(self, left: fx.Node, right: fx.Node) -> None:
        """Say that two values may share memory."""
        source, target = self._root(left), self._root(right)
        if source is not target:
            self._parent[source] = target
            self._members.setdefault(target, [target]).extend(self._members.pop(source, [source]))

    def group(self, value: fx.Node) -> list[fx.Node]:
        """Return every value that may share memory with this one, itself too."""
        root = self._root(value)
        return self._members.get(root, [root])

    def _root(self, node: fx.Node) -> fx.Node:
        root = node
        while root in self._parent:
            root = self._parent[root]
        while node is not root:
            self._parent[node], node = root, self._parent[node]
        return root

    def shared(self, left: fx.Node, right: fx.Node) -> bool:
        """Say whether two values may share memory."""
        return self._root(left) is self._root(right)

    def written(self, value: fx.Node, after: fx.Node, before: fx.Node) -> Iterator[fx.Node]:
        """Yield the nodes between two others that may write into the memory of `value`."""
        start, end = self.order[after], self.order[before]
        for node in self.group(value):
            if node in self.writes and start < self.order[node] < end:
                yield node


def _may_write(module: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether a node writes into its first operand, or a layer inside its module may."""
    called = called_module(module, node)
    inner = called is not None and any(getattr(m, "inplace", False) for m in called.modules())
    return inner or writes_in_place(module, node)
