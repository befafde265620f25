"""The part of a graph that runs for one residual branch alone.

A node belongs to a branch when everything that it computes ends in that branch: each of its users
belongs to the branch, up to the one edge into the add. What such nodes read from elsewhere (the
fork, masks, position tables, sizes) is the region's boundary. The branch can be computed for some
samples only, or not at all, where

- the add is a plain one of two operands;
- each tensor of the boundary has the batch on a known axis, or provably none of it (where there is
  one tensor and nothing is known of it, its batch is taken to be on axis 0, as the row mask does);
- no node of the region writes into memory that is read outside of it (such a node, and what comes
  before it, stays outside: the region starts behind it);
- nothing outside writes into the boundary while the region still reads it.

Sizes that the region reads are no values: those that hold the batch size are asked for again from
the chosen rows.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from dropsurgery.graph.batch import batch_axes
from dropsurgery.graph.memory import Memory
from dropsurgery.graph.ops import Role, roles, writes_in_place

_ADDS = (operator.add, operator.iadd, torch.add)


class NoRegion(Exception):
    """Why a branch can only be masked; the message is one line."""


@dataclass(frozen=True)
class Region:
    """The nodes of one branch, and what they read.

    Attributes:
        branch: the node whose value is the branch.
        add: the add that it goes into.
        skip: the add's other operand.
        nodes: the nodes that run for this branch alone, in order; `branch` is one of them.
        gathered: tensors of the boundary that hold the batch, with its axis.
        sizes: boundary values that are no tensors, and every size before them, in order.
        asked: the tensors that `sizes` ask for their shape, with the batch axis.
        passed: what else the region reads: parameters, tables, numbers.
        in_place: the add writes the sum into the skip.
    """

    branch: fx.Node
    add: fx.Node
    skip: fx.Node
    nodes: tuple[fx.Node, ...]
    gathered: dict[fx.Node, int]
    sizes: tuple[fx.Node, ...]
    asked: dict[fx.Node, int]
    passed: tuple[fx.Node, ...]
    in_place: bool


class Regions:
    """Finds the regions of one graph of a traced module. Reads; never changes it."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph) -> None:
        self.module = module
        self.graph = graph
        self.roles = roles(module, graph)
        self.memory = Memory(module, graph)
        self.order = self.memory.order
        self.listed = list(self.order)
        self.axes = batch_axes(module, graph)
        self._idle = self._idle_nodes()

    def find(self, branch: fx.Node, add: fx.Node, via: fx.Node | None = None) -> Region:
        """Return the region of a branch that an add reads, through `via` where a node is between.

        Raises:
            NoRegion: the branch can only be masked.
        """
        skip = _other_operand(add, via or branch)
        nodes = self._nodes(branch, add, via)
        inside = set(nodes)
        boundary = _unique(v for n in nodes for v in n.all_input_nodes if v not in inside)
        scalars = [v for v in boundary if self.roles[v] is Role.SCALAR]
        tensors = [v for v in boundary if v.op != "get_attr" and v not in scalars]
        sizes, asked_of = self._sizes(scalars)
        axes = self._batch_axes(_unique((*tensors, *asked_of)))
        gathered = {value: axes[value] for value in tensors if value in axes}
        asked = {value: axes[value] for value in asked_of if value in axes}
        passed = [value for value in tensors if value not in axes]
        if not gathered:
            raise NoRegion("nothing that the branch reads is known to hold the batch")
        self._check_writes(nodes, (*gathered, *passed))
        in_place = writes_in_place(self.module, add) and add.args[0] is skip
        return Region(branch, add, skip, nodes, gathered, sizes, asked, tuple(passed), in_place)

    def check_move(self, region: Region) -> None:
        """Check that the region may run as one piece right before its add.

        Raises:
            NoRegion: something is written in between that it reads.
        """
        for value in (*region.gathered, *region.passed):
            for node in self.memory.written(value, region.nodes[0], region.add):
                if node not in set(region.nodes):
                    raise NoRegion(f"'{node.name}' writes in place into what the branch reads")

    def _nodes(self, branch: fx.Node, add: fx.Node, via: fx.Node | None) -> tuple[fx.Node, ...]:
        """Return the nodes that run for the branch alone."""
        outside: set[fx.Node] = set()
        while True:
            inside = self._closure(branch, add, via, outside)
            if branch not in inside:
                if branch in outside:
                    raise NoRegion(f"'{branch.name}' writes in place into what others read")
                raise NoRegion(f"the branch '{branch.name}' is used elsewhere too")
            bound = {v for n in inside for v in n.all_input_nodes if v not in inside}
            wrong = {n for n in inside if self._writes_outside(n, inside, bound, {add, via})}
            if not wrong:
                return tuple(sorted(inside, key=self.order.__getitem__))
            outside |= wrong

    def _closure(
        self, branch: fx.Node, add: fx.Node, via: fx.Node | None, outside: set[fx.Node]
    ) -> set[fx.Node]:
        reader, end = via or add, self.order[add]
        # What reads the branch after an add that writes into it reads the sum.
        late = via is None and writes_in_place(self.module, add) and add.args[0] is branch
        inside: set[fx.Node] = set()
        heap, seen = [-self.order[branch]], {branch}
        while heap:
            node = self.listed[-heapq.heappop(heap)]
            if node in outside or node.op in ("placeholder", "get_attr"):
                continue
            needed = [user for user in node.users if user not in self._idle]
            if node is branch and late:
                needed = [user for user in needed if self.order[user] <= end]
            if all(user in inside or (node is branch and user is reader) for user in needed):
                inside.add(node)
                for value in node.all_input_nodes:
                    if value not in seen:
                        seen.add(value)
                        heapq.heappush(heap, -self.order[value])
        # Checks of shapes and the like that hang on the branch's own values run with them.
        pending = list(inside)
        while pending:
            hanging = [u for u in pending.pop().users if u in self._idle and u not in inside]
            inside.update(hanging)
            pending += hanging
        return inside

    def _idle_nodes(self) -> set[fx.Node]:
        """Return the nodes whose value nothing uses in the end: unused items, asserted sizes."""
        idle: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            pure = node.op in ("call_function", "call_method") and node not in self.memory.writes
            if pure and all(user in idle for user in node.users):
                idle.add(node)
        return idle

    def _writes_outside(
        self,
        node: fx.Node,
        inside: set[fx.Node],
        boundary: set[fx.Node],
        own: set[fx.Node | None],
    ) -> bool:
        """Say whether a node of the region writes into memory that others may read."""
        if node not in self.memory.writes:
            return False
        if any(self.memory.shared(node, value) for value in boundary):
            return True
        return any(o not in inside and o not in own for o in self.memory.group(node))

    def _batch_axes(self, tensors: list[fx.Node]) -> dict[fx.Node, int]:
        """Return the batch axis of those tensors that hold the batch."""
        found = {v: self.axes[v] for v in tensors if self.axes[v].kind != "none"}
        if len(found) == 1 and next(iter(found.values())).kind == "unknown":
            return dict.fromkeys(found, 0)
        for value, at in found.items():
            if at.kind == "unknown":
                raise NoRegion(
                    f"which axis of '{value.name}' is the batch is not known; "
                    "example_inputs may settle it"
                )
            if at.kind == "mixed":
                raise NoRegion(f"no axis of '{value.name}', which the branch reads, is the batch")
        return {value: at.axis for value, at in found.items() if at.axis is not None}

    def _sizes(self, scalars: list[fx.Node]) -> tuple[tuple[fx.Node, ...], list[fx.Node]]:
        """Return the sizes behind some values, and the tensors that they are asked of."""
        sizes, asked, pending = set(scalars), dict[fx.Node, None](), list(scalars)
        while pending:
            for value in pending.pop().all_input_nodes:
                if self.roles[value] is not Role.SCALAR:
                    asked[value] = None
                elif value not in sizes:
                    sizes.add(value)
                    pending.append(value)
        return tuple(sorted(sizes, key=self.order.__getitem__)), list(asked)

    def _check_writes(self, nodes: tuple[fx.Node, ...], boundary: Iterable[fx.Node]) -> None:
        """Refuse where something outside writes into the boundary between two of its reads."""
        inside = set(nodes)
        for value in boundary:
            readers = [node for node in nodes if value in node.all_input_nodes]
            for node in self.memory.written(value, readers[0], readers[-1]):
                if node not in inside:
                    raise NoRegion(f"'{node.name}' writes in place into what the branch reads")


def _other_operand(add: fx.Node, operand: fx.Node) -> fx.Node:
    """Return what an add adds to `operand`."""
    plain = add.op == "call_function" and add.target in _ADDS
    plain = plain or (add.op == "call_method" and add.target in ("add", "add_"))
    operands = add.args if plain and not add.kwargs and len(add.args) == 2 else ()
    others = [value for value in operands if value is not operand]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        raise NoRegion(f"'{add.name}' is no plain sum of two tensors")
    return others[0]


def _unique(values: Iterable[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(values))
