"""Regions of a graph that compute one value from another linearly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from dropsurgery.graph.affine import Refused
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.linear import Linear
from dropsurgery.graph.memory import Memory
from dropsurgery.graph.pieces import Gain, Piece, Same, Sum, Unread
from dropsurgery.graph.stencil import Stencil


@dataclass(frozen=True)
class Region:
    """What computes one value from another, linearly.

    Attributes:
        form: what it computes.
        nodes: its nodes, without the source.
        costs: its layers: each with its weights, and its stride against the source.
        sums: its sums.
    """

    form: Stencil
    nodes: frozenset[fx.Node] = frozenset()
    costs: frozenset[tuple[fx.Node, int, int]] = frozenset()
    sums: frozenset[fx.Node] = frozenset()

    def joined(self, form: Stencil, node: fx.Node, other: Region | None = None) -> Region:
        """Return the region with another, and with a node that has this form."""
        other = self if other is None else other
        return Region(
            form, self.nodes | other.nodes | {node}, self.costs | other.costs,
            self.sums | other.sums,
        )  # fmt: skip


# The regions that compute a node, by source; a reason where one is linear but cannot be merged.
Regions = dict[fx.Node, "Region | str"]


class LinearRegions:
    """Finds, for every node, the values that it is a linear function of.

    Args:
        module: the traced module.
        modules: its modules by path.
    """

    def __init__(self, module: fx.GraphModule, modules: Mapping[str, nn.Module]) -> None:
        self.linear = Linear(module, modules, Shapes(module, module.graph, modules))
        self.memory = Memory(module, module.graph)
        self.found: dict[fx.Node, Regions] = {}
        for node in module.graph.nodes:
            self.found[node] = self._read(node)

    def _read(self, node: fx.Node) -> Regions:
        """Return the regions that compute a node."""
        piece = self.linear.piece(node)
        if piece is None:
            return {}
        if isinstance(piece, Sum):
            left, right = self._reach(piece.left), self._reach(piece.right)
            found: Regions = {}
            for source, first in left.items():
                if source in right:
                    found[source] = self._attempt(node, piece, source, first, right[source])
            return found
        inner = self._reach(piece.data)
        return {s: self._attempt(node, piece, s, region) for s, region in inner.items()}

    def _reach(self, node: fx.Node) -> Regions:
        """Return the regions that compute a node, with the empty one: the node itself."""
        known = self.linear.source(node)
        own: Regions = {}
        if known is not None:
            own[node] = Region(Stencil.identity(known.spatial, known.channels))
        return {**own, **self.found.get(node, {})}

    def _attempt(
        self, node: fx.Node, piece: Piece, source: fx.Node, *inner: Region | str
    ) -> Region | str:
        """Return the region of a node, given those of its operands; or why there is none."""
        try:
            return self._extend(node, piece, source, *map(_sound, inner))
        except Refused as refused:
            return str(refused)

    def _extend(
        self, node: fx.Node, piece: Piece, source: fx.Node, region: Region, *others: Region
    ) -> Region:
        known = self.linear.source(source)
        assert known is not None
        if node in self.memory.writes:
            raise Refused(f"'{node.name}' writes in place")
        if isinstance(piece, Unread):
            raise Refused(piece.reason)
        if isinstance(piece, Same):
            return region.joined(region.form, node)
        if isinstance(piece, Gain):
            self.linear.affine(piece, known, region.form.outputs)
            return region.joined(region.form.shifted() if piece.shifts else region.form, node)
        if isinstance(piece, Sum):
            joined = region.joined(region.form.plus(others[0].form), node, others[0])
            return Region(joined.form, joined.nodes, joined.costs, joined.sums | {node})
        outer = piece.form(known.spatial, region.form.outputs)
        form = outer.behind(region.form)
        weights = outer.numel if piece.weighted is not None else 0
        joined = region.joined(form, node)
        costs = joined.costs | {(node, weights, form.stride)}
        return Region(form, joined.nodes, costs, joined.sums)

    def not_closed(self, node: fx.Node, source: fx.Node, region: Region) -> str | None:
        """Return what else reads or writes what a region computes with, or None."""
        for value in region.nodes - {node}:
            others = [user.name for user in value.users if user not in region.nodes]
            if others:
                return f"'{value.name}', between its branches, is read by {', '.join(others)}, too"
        written = next(self.memory.written(source, source, node), None)
        if written is not None:
            return f"'{written.name}' writes into its input in between"
        read = {v for value in region.nodes for v in value.all_input_nodes} - region.nodes
        for constant in read - {source}:
            for member in self.memory.group(constant):
                if member in self.memory.writes:
                    return f"'{member.name}' writes into a constant that it reads"
        return None


def _sound(region: Region | str) -> Region:
    if isinstance(region, str):
        raise Refused(region)
    return region
