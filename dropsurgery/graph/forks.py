"""Dataflow behind an add: where its two operands part ways.

Only data counts as an edge: parameters, constants and sizes do not. The nodes behind a skip are
visited nearest first, and the ancestors of the branch are expanded just as far back as the node
that is asked about, so that a fork is found in time proportional to its branch.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from dropsurgery.graph.ops import Kind, Role, kind_of, module_kind, roles
from dropsurgery.layers.attention import ScaledDotProductAttention

_PASSED_BY_SKIP = frozenset(
    {Kind.ALIAS, Kind.DROP, Kind.SLICE, Kind.ITEM, Kind.LINEAR, Kind.POOL, Kind.NORM, Kind.SUB,
     Kind.SPLIT}
)  # fmt: skip
_VIEWS = frozenset({Kind.ALIAS, Kind.SLICE, Kind.SPLIT})
_UNARY = frozenset({Kind.ALIAS, Kind.DROP, Kind.SLICE})
_REDUCTIONS = frozenset(
    {"sum", "mean", "prod", "amax", "amin", "max", "min", "norm", "var", "std", "median"}
)
_SAME_VALUES = frozenset({Kind.ALIAS, Kind.DROP})
_AFFINE = frozenset(
    {Kind.ALIAS, Kind.DROP, Kind.SLICE, Kind.ITEM, Kind.LINEAR, Kind.ADD, Kind.SUB, Kind.CONCAT,
     Kind.SPLIT}
)  # fmt: skip


@dataclass
class Fork:
    """One operand of an add as skip, the other as branch, and the node that both come from.

    Attributes:
        node: the fork.
        skip: the operand that comes from it through what a skip may do.
        branch: the operand that is computed from it.
        identity: nothing but views lies between the fork and the skip.
        light: nothing but views and BatchNorm lies between them.
        region: the nodes between the fork and the branch operand, in order, the latter included.
        linear: everything in the region is affine in the fork.
    """

    node: fx.Node
    skip: fx.Node
    branch: fx.Node
    identity: bool
    light: bool
    region: list[fx.Node]
    linear: bool


class Flow:
    """The dataflow of one graph of a traced module. Reads; never changes it.

    `streams` maps an add that is known to carry a residual stream to its skip operand: behind such
    an add the stream goes on along the skip.
    """

    def __init__(self, module: fx.GraphModule, graph: fx.Graph) -> None:
        self.module = module
        self.nodes = list(graph.nodes)
        self.index = {node: position for position, node in enumerate(self.nodes)}
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self._kinds = {
            node: module_kind(self.modules[str(node.target)])
            if node.op == "call_module"
            else kind_of(module, node)
            for node in self.nodes
        }
        self.roles = roles(module, graph, self._kinds)
        self.streams: dict[fx.Node, fx.Node] = {}

    def kind(self, node: fx.Node) -> Kind:
        """Return the kind of a node."""
        return self._kinds[node]

    def data(self, node: fx.Node) -> list[fx.Node]:
        """Return the inputs of a node through which data flows.

        Of a view that is the tensor: sizes beside it are none, wherever they come from.
        """
        inputs = node.all_input_nodes
        if self.kind(node) in _VIEWS:
            inputs = inputs[:1]
        return [value for value in inputs if self.roles[value] is Role.DATA]

    def fork(self, skip: fx.Node, branch: fx.Node) -> Fork | None:
        """Return the nearest fork that makes `skip` the skip and `branch` the branch."""
        ancestors = _Ancestors(self, branch)
        for node, identity, light in self._behind(skip):
            if node is branch:
                return None  # the skip is computed from it: if at all, they change places
            if ancestors.holds(node) and (region := self._region(node, ancestors)):
                return Fork(node, skip, branch, identity, light, region, self._affine(region))
        return None

    def _behind(self, skip: fx.Node) -> Iterator[tuple[fx.Node, bool, bool]]:
        """Yield (node, identity, light) for the nodes that all of a skip comes from, latest first.

        Where a skip is put together from parts (a class token and pooled patches), only nodes that
        every part comes from are yielded: those at which nothing earlier is left to visit. A part
        that ends shares nothing earlier with the others.
        """
        heap = [-self.index[skip]]
        seen = {skip}
        missing: dict[fx.Node, set[fx.Node]] = {}
        identity = light = True
        while heap:
            node = self.nodes[-heapq.heappop(heap)]
            if not heap and not missing:
                yield node, identity, light
            same = self.kind(node) in _SAME_VALUES or node in self.streams
            identity = identity and same
            light = light and (same or self._is_batchnorm(node))
            before = self._before(node)
            if heap and not before:
                return
            for value in before:
                if self._is_part(node, value):
                    # A part of a tuple is no skip of the whole; all parts together are.
                    left = missing.setdefault(value, set(value.users))
                    left.discard(node)
                    if left:
                        continue
                    del missing[value]
                if value not in seen:
                    seen.add(value)
                    heapq.heappush(heap, -self.index[value])

    def _before(self, node: fx.Node) -> list[fx.Node]:
        """Return the inputs through which a skip goes on behind `node`; none where it ends."""
        if node in self.streams:
            return [self.streams[node]]
        kind, before = self.kind(node), self.data(node)
        if kind is Kind.CONCAT:
            return before
        if len(before) != 1 or _adds_an_axis(node):
            return []
        if kind is Kind.ITEM and self._is_tuple(before[0]):
            return before if self.kind(before[0]) is Kind.SPLIT else []
        scaled = kind is Kind.PRODUCT and self.elementwise(node)
        return before if kind in _PASSED_BY_SKIP or kind is Kind.ADD or scaled else []

    def _is_part(self, node: fx.Node, whole: fx.Node) -> bool:
        return self.kind(node) is Kind.ITEM and self.kind(whole) is Kind.SPLIT

    def _is_batchnorm(self, node: fx.Node) -> bool:
        called = self.modules.get(str(node.target)) if node.op == "call_module" else None
        return isinstance(called, _NormBase) and self.kind(node) is Kind.LINEAR

    def _is_tuple(self, node: fx.Node) -> bool:
        """Say whether a node's value is a tuple of parts, of which an item is another value."""
        return self.kind(node) is Kind.SPLIT or (
            self.kind(node) is Kind.NONLINEAR
            and all(self.kind(u) is Kind.ITEM and isinstance(u.args[1], int) for u in node.users)
        )

    def elementwise(self, node: fx.Node) -> bool:
        """Say whether a product multiplies or divides element by element."""
        name = getattr(node.target, "__name__", str(node.target)).strip("_")
        return name in ("mul", "imul", "div", "truediv", "itruediv")

    def _region(self, fork: fx.Node, ancestors: _Ancestors) -> list[fx.Node]:
        """Return the nodes on the paths from `fork` (left out) to the branch operand, in order.

        A residual add hands on what its skip carries: a position table that was added inside the
        branch of an earlier block is no fork of the stream. Empty where no path is left.
        """
        start = self.index[fork]
        members = (n for n in ancestors.seen if self.index[n] > start)
        reached, region = {fork}, []
        for node in sorted(members, key=self.index.__getitem__):
            carried = [self.streams[node]] if node in self.streams else self.data(node)
            if any(value in reached for value in carried):
                reached.add(node)
                region.append(node)
        return region if region and region[-1] is ancestors.node else []

    def _affine(self, region: list[fx.Node]) -> bool:
        return all(
            self.kind(node) in _AFFINE
            or (self.kind(node) is Kind.PRODUCT and len(self.data(node)) == 1)
            for node in region
        )

    def tail(self, branch: fx.Node) -> Iterator[fx.Node]:
        """Yield the branch operand and what lies behind gains, biases, slices and views only."""
        node = branch
        while True:
            yield node
            before = self.data(node)
            gain = self.kind(node) in (Kind.PRODUCT, Kind.ADD) or node.target is torch.addcmul
            passes = gain or self.kind(node) in (Kind.ALIAS, Kind.DROP, Kind.SLICE, Kind.ITEM)
            if not passes or len(before) != 1:
                return
            node = before[0]

    def is_gate(self, fork: Fork) -> bool:
        """Say whether the branch is the fork times something: x + x·g(x) only scales x."""
        last = list(self.tail(fork.branch))[-1]
        if self.kind(last) is not Kind.PRODUCT or not self.elementwise(last):
            return False
        return any(fork.node in self._views(value) for value in self.data(last))

    def _views(self, node: fx.Node) -> Iterator[fx.Node]:
        yield node
        while self.kind(node) in _SAME_VALUES and len(self.data(node)) == 1:
            node = self.data(node)[0]
            yield node

    def is_number(self, node: fx.Node) -> bool:
        """Say whether a value is one number, reduced over all axes: no branch, and no skip."""
        last = list(self.tail(node))[-1]
        name = getattr(last.target, "__name__", str(last.target))
        called = last.op in ("call_function", "call_method") and name in _REDUCTIONS
        return called and len(last.args) == 1 and not last.kwargs.keys() & {"dim", "axis", "other"}

    def gated(self) -> set[fx.Node]:
        """Return the nodes that are only part of a gate g in some product x · g(x).

        Each gate is explored as far back as what it alone reads.
        """
        inside: set[fx.Node] = set()
        for node in self.nodes:
            if not self._scales(node):
                continue
            for gate in self.data(node):
                scaled = {view for v in self.data(node) if v is not gate for view in self._views(v)}
                own, read = self._own(gate, node, scaled)
                if own and read and read <= scaled:
                    inside |= own
        return inside

    def _scales(self, node: fx.Node) -> bool:
        """Say whether a node multiplies two values, element by element."""
        product = self.kind(node) is Kind.PRODUCT and self.elementwise(node)
        return product and len(self.data(node)) > 1

    def _own(
        self, gate: fx.Node, product: fx.Node, scaled: set[fx.Node]
    ) -> tuple[set[fx.Node], set[fx.Node]]:
        """Return the nodes that go into `gate` alone, and what these read of other values."""
        own: set[fx.Node] = set()
        read: set[fx.Node] = set()
        heap, seen = [-self.index[gate]], {gate}
        while heap:
            node = self.nodes[-heapq.heappop(heap)]
            users = (user for user in node.users if self.roles[user] is Role.DATA)
            if node in scaled or not all(user in own or user is product for user in users):
                read.add(node)
                continue
            own.add(node)
            for value in self.data(node):
                if value not in seen:
                    seen.add(value)
                    heapq.heappush(heap, -self.index[value])
        return own, read

    def is_sibling_product(self, fork: Fork) -> bool:
        """Say whether a branch is a function of the fork times a sibling of it, both projected.

        So is attention that adds its queries to what they picked of the keys.
        """
        last = fork.branch
        while len(self.data(last)) == 1 and self.kind(last) in _UNARY | {Kind.LINEAR}:
            last = self.data(last)[0]
        if not self._scales(last):
            return False
        region = set(fork.region)
        others = [v for v in self.data(last) if v not in region and v is not fork.node]
        sources = self._projected(fork.node)
        return any(not sources.isdisjoint(self._projected(other)) for other in others)

    def _projected(self, node: fx.Node) -> set[fx.Node]:
        """Return the values of which a node is a function of one linear map of them, if it is."""
        before = self.data(node)
        while len(before) == 1 and self.kind(node) is not Kind.LINEAR:
            if self.kind(node) not in _UNARY | {Kind.NONLINEAR, Kind.NORM}:
                return set()
            node = before[0]
            before = self.data(node)
        return set(before) if self.kind(node) is Kind.LINEAR else set()

    def is_attention_product(self, branch: fx.Node) -> bool:
        """Say whether a branch is weights times values, not yet projected: inside attention."""
        last = list(self.tail(branch))[-1]
        if self.kind(last) is Kind.PRODUCT:
            return len(self.data(last)) > 1 and not self.elementwise(last)
        if last.op == "call_module":
            return isinstance(self.modules[str(last.target)], ScaledDotProductAttention)
        return last.target is F.scaled_dot_product_attention


def _adds_an_axis(node: fx.Node) -> bool:
    """Say whether a value gets a new axis, as an embedding does before it is spread over a map."""
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return any(part is None for part in index)
    return node.target in ("unsqueeze", torch.unsqueeze)


class _Ancestors:
    """The ancestors of a node, expanded backwards only as far as is asked."""

    def __init__(self, flow: Flow, node: fx.Node) -> None:
        self.flow = flow
        self.node = node
        self.seen = {node}
        self.heap = [-flow.index[node]]

    def holds(self, node: fx.Node) -> bool:
        """Say whether `node` is the start or an ancestor of it."""
        position = self.flow.index[node]
        while self.heap and -self.heap[0] > position:
            for value in self.flow.data(self.flow.nodes[-heapq.heappop(self.heap)]):
                if value not in self.seen:
                    self.seen.add(value)
                    heapq.heappush(self.heap, -self.flow.index[value])
        return node in self.seen
