"""Which axis of a value carries its channels, proved from shapes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from dropsurgery.graph.affine import argument
from dropsurgery.graph.shape_calls import Call, Contradiction, Shape
from dropsurgery.graph.shape_rules import output_shape
from dropsurgery.graph.weighted import Weighted

# An operation that tells ranks apart does so below this one: torch's own stop at 5 (3-d
# convolutions), and no rule of `shape_rules` treats rank 8 unlike rank 7.
_RANKS = range(9)


class Shapes:
    """Ranks and sizes of every value of a graph, as far as they are certain.

    They come from `tensor_meta`, where the network was traced with example inputs (and then hold
    for inputs of those ranks); else by inference over the graph:

    - operations that fix the rank: `flatten(1)`, a reshape to a list of sizes, a 2-d convolution,
      pooling or BatchNorm, `permute` …, and those that keep it or change it by a known number;
    - by contradiction: each rank that a network input (or the output of an operation without a
      rule) could have is assumed in turn and carried through the whole graph. Ranks on which
      torch would raise an error are ruled out; what all remaining ones agree on is proved. In
      Linear → BatchNorm1d(64) → … → Linear → BatchNorm1d(32), rank 3 would need axis 1 to have
      64 and 32 entries, so that the rank is 2.

    Convolutions and pooling whose input is of unknown rank are taken to be batched. In a graph that
    contradicts this (a 3-d convolution before a 2-d BatchNorm) nothing is proved.

    Args:
        root: the module whose paths the graph's nodes name.
        graph: the graph; it is not changed.
        modules: the modules of `root` by path, if the caller has them.
    """

    def __init__(
        self, root: nn.Module, graph: fx.Graph, modules: Mapping[str, nn.Module] | None = None
    ) -> None:
        self._root = root
        self._graph = graph
        found = dict(root.named_modules(remove_duplicate=False)) if modules is None else modules
        self._modules = found
        self._certain: dict[fx.Node, Shape | None] | None = None
        self._is_contradictory = False
        self._cases: dict[fx.Node, list[dict[fx.Node, Shape | None]]] = {}

    def rank(self, node: fx.Node) -> int | None:
        """Return the number of axes of a node's output, or None where it is not proved."""
        shape = traced_shape(node) or self._known().get(node)
        return self._rank_by_cases(node) if shape is None else len(shape)

    def shape(self, node: fx.Node) -> Shape | None:
        """Return what is known of the sizes of a node's output; None where its rank is not."""
        shape = traced_shape(node) or self._known().get(node)
        if shape is None:
            rank = self._rank_by_cases(node)
            return None if rank is None else (None,) * rank
        return shape

    def contradicts(self) -> bool:
        """Say whether the graph cannot run on batched inputs, nor on what it was traced with."""
        self._known()
        return self._is_contradictory

    def certain_rank(self, node: fx.Node) -> int | None:
        """Return the number of axes where it follows without cases, in no time."""
        shape = traced_shape(node) or self._known().get(node)
        return None if shape is None else len(shape)

    def _known(self) -> dict[fx.Node, Shape | None]:
        """Return what follows without assuming any rank."""
        if self._certain is None:
            try:
                self._certain = self._infer({})
            except Contradiction:
                self._certain, self._is_contradictory = {}, True
        return self._certain

    def _infer(self, assumed: Mapping[fx.Node, int]) -> dict[fx.Node, Shape | None]:
        """Carry shapes through the graph; raises `Contradiction` where they cannot be."""
        shapes: dict[fx.Node, Shape | None] = {}
        for node in self._graph.nodes:
            shape = traced_shape(node)
            if shape is None and node in assumed:
                shape = (None,) * assumed[node]
            elif shape is None and node.op not in ("placeholder", "output"):
                called = self._modules.get(str(node.target)) if node.op == "call_module" else None
                shape = output_shape(Call(self._root, node, called, shapes))
            shapes[node] = shape
        return shapes

    def _rank_by_cases(self, node: fx.Node) -> int | None:
        """Prove a rank by ruling out what the values upstream of `node` could be."""
        for origin in self._origins(node):
            shapes = [case[node] for case in self._possible(origin)]
            ranks = {None if shape is None else len(shape) for shape in shapes}
            if len(ranks) == 1 and None not in ranks:
                return ranks.pop()
        return None

    def _possible(self, origin: fx.Node) -> list[dict[fx.Node, Shape | None]]:
        """Return the shapes of the graph for each rank that `origin` can have."""
        if origin not in self._cases:
            self._cases[origin] = []
            for rank in _RANKS:
                try:
                    self._cases[origin].append(self._infer({origin: rank}))
                except Contradiction:
                    continue
        return self._cases[origin]

    def _origins(self, node: fx.Node) -> list[fx.Node]:
        """Return the values of unknown rank, upstream of `node`, that follow from no other."""
        certain = self._known()
        origins, seen, stack = list[fx.Node](), set[fx.Node](), [node]
        while stack:
            current = stack.pop()
            if current in seen or certain.get(current) is not None:
                continue
            seen.add(current)
            unknown = [n for n in current.all_input_nodes if certain.get(n) is None]
            stack += unknown
            tensors = [n for n in unknown if not _may_be_tuple(n)]
            follows = bool(tensors) and self._follows(current, tensors)
            if not follows and not _may_be_tuple(current):
                origins.append(current)
        return origins

    def _follows(self, node: fx.Node, unknown: list[fx.Node]) -> bool:
        """Say whether a node's rank would follow, were the ranks of its inputs known."""
        shapes = {**self._known(), **dict.fromkeys(unknown, (None, None, None))}
        called = self._modules.get(str(node.target)) if node.op == "call_module" else None
        try:
            return output_shape(Call(self._root, node, called, shapes)) is not None
        except Contradiction:
            return True


def _may_be_tuple(node: fx.Node) -> bool:
    """Say whether a value may be several: the parts of a tuple need not be of one rank."""
    return any(
        user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users
    )


def traced_shape(node: fx.Node) -> Shape | None:
    """Return the shape that a node's output had for the example inputs, where there were some."""
    meta: Any = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(int(size) for size in shape)


_VIEWS: Mapping[Any, str] = {
    **{name: name for name in ("contiguous", "permute", "transpose", "flatten")},
    torch.permute: "permute",
    torch.transpose: "transpose",
    torch.flatten: "flatten",
}


def axis_before_view(shapes: Shapes, node: fx.Node, axis: int) -> tuple[fx.Node, int | None] | None:
    """Follow an axis back through an operation that only moves values.

    Args:
        shapes: what is known of the graph's shapes.
        node: the operation.
        axis: an axis of its output, counted from the front.

    Returns:
        The input, and the axis of it that holds the same entries in the same order; None for the
        axis where it is not proved, or was merged with others. None where `node` is no such
        operation.
    """
    kind = _VIEWS.get(node.target) if node.op in ("call_method", "call_function") else None
    source = argument(node, 0, "input")
    if kind is None or not isinstance(source, fx.Node):
        return None
    if kind == "permute":
        rest = node.args[1:] or (node.kwargs.get("dims"),)
        order = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
        found = order[axis] if axis < len(order) else None
        return source, found % len(order) if isinstance(found, int) else None
    if kind == "transpose":
        ends = (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
    elif kind == "flatten":
        ends = (argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1))
    else:
        return source, axis
    first, last = (_from_the_front(shapes, source, end) for end in ends)
    if first is None or last is None:
        return source, None
    if kind == "transpose":
        return source, {first: last, last: first}.get(axis, axis)
    if axis == first < last:
        return source, None
    return source, axis if axis <= first else axis + last - first


def moves_axes(node: fx.Node) -> bool:
    """Say whether a node's output is its input with its axes in another order, as a view."""
    kind = _VIEWS.get(node.target) if node.op in ("call_method", "call_function") else None
    return kind in ("permute", "transpose")


def _from_the_front(shapes: Shapes, node: fx.Node, axis: Any) -> int | None:
    """Count an axis of a node's output from the front."""
    if not isinstance(axis, int) or axis >= 0:
        return axis if isinstance(axis, int) else None
    rank = shapes.rank(node)
    return None if rank is None else axis + rank


def channel_axis(shapes: Shapes, node: fx.Node, weighted: Weighted) -> int | None:
    """Return the axis of a layer's output, counted from the front, that carries its channels.

    A linear layer's is the last one, so that its rank must be proved. A convolution's comes
    before the spatial ones; where nothing tells that its input is unbatched, it is axis 1.

    Returns:
        The axis, or None where it is not proved.
    """
    rank = shapes.rank(node)
    if weighted.spatial is None:
        return None if rank is None else rank - 1
    if rank is None and shapes.contradicts():
        return None
    return 1 if rank is None else rank - weighted.spatial - 1
