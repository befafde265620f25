"""How a gauge spreads through a graph until layers have taken it everywhere.

A gauged value has one producer and some readers, and each of them must come to terms with it: by
taking the vector into its weights, or by handing it on to its other inputs and its output
(`transfer_rules`). A spread that comes to rest is exact by construction, whatever way it took;
one that meets an operation which can do neither is refused, and nothing has changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from dropsurgery.graph.affine import NORM_LAYERS, Refused, identity_input, norm_function
from dropsurgery.graph.carriers import (
    check_alone,
    input_axis,
    is_padded,
    is_plain_conv,
    output_axis,
    read_carrier,
)
from dropsurgery.graph.channel_maps import ADDS, operands
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.gauge import Gauge
from dropsurgery.graph.ledger import Deposit, Ledger, MapState, Port
from dropsurgery.graph.memory import Memory
from dropsurgery.graph.stored import Table, check_own
from dropsurgery.graph.transfer_rules import (
    Known,
    Option,
    addition,
    find_rule,
    is_homogeneous,
    product,
)
from dropsurgery.graph.uses import Uses, value_readers
from dropsurgery.graph.weighted import Weighted

# Operations that one spread may settle, so that planning stays linear in the size of the graph.
LIMIT = 300


@dataclass
class Spread:
    """The values that change, and what is deposited where.

    Attributes:
        gauges: by value.
        deposits: by node and port.
        order: operations that have to be settled, those with several operands last.
        late: those.
    """

    gauges: dict[fx.Node, Gauge] = field(default_factory=dict)
    deposits: dict[tuple[str, str], Gauge] = field(default_factory=dict)
    order: list[fx.Node] = field(default_factory=list)
    late: list[fx.Node] = field(default_factory=list)

    def copy(self) -> Spread:
        """Return a copy to go on with."""
        return Spread(dict(self.gauges), dict(self.deposits), [*self.order], [*self.late])

    def as_deposits(self) -> tuple[Deposit, ...]:
        """Return the deposits as plain data."""
        return tuple(
            Deposit(name, _port(port), gauge.axis, gauge.path)
            for (name, port), gauge in self.deposits.items()
        )


def _port(name: str) -> Port:
    ports: dict[str, Port] = {"in": "in", "out": "out", "border": "border"}
    return ports.get(name, "through")


class Scene:
    """A graph in which gauges spread.

    Args:
        module: the traced module.
        ledger: what was moved so far.
        memory: which values share memory.
        borders: whether a convolution that pads with zeros may take a shift, for a map of its own
            borders behind it.
    """

    def __init__(
        self, module: fx.GraphModule, ledger: Ledger, memory: Memory, *, borders: bool = False
    ) -> None:
        self.borders = borders
        self.module, self.ledger, self.memory = module, ledger, memory
        self.modules: Mapping[str, nn.Module] = ledger.modules
        self.uses = Uses(module, module.graph, self.modules)
        self.shapes = Shapes(module, module.graph, self.modules)
        self._carriers: dict[fx.Node, Weighted | Refused | None] = {}
        self._pure: dict[fx.Node, bool] = {}
        self.source: fx.Node | None = None
        self.left = 0

    def called(self, node: fx.Node) -> Any:
        """Return the module that a node calls, else None."""
        return self.ledger.called(node)

    def spread(self, source: fx.Node, wire: fx.Node, gauge: Gauge) -> Spread:
        """Return how a gauge on the input or output of a map comes to rest.

        Raises:
            Refused: it does not.
        """
        self.source, self.left = source, LIMIT
        first = Spread()
        self._enter(first, wire, gauge)
        first.order = [op for op in first.order if op is not source]
        first.late = [op for op in first.late if op is not source]
        return self._settle(first)

    def _settle(self, spread: Spread) -> Spread:
        while spread.order or spread.late:
            op = spread.order.pop() if spread.order else spread.late.pop(0)
            self.left -= 1
            if self.left < 0:
                raise Refused("it would change too much of the network")
            if op is self.source:
                raise Refused("it comes round to where it began")
            options = self.options(op, spread.gauges)
            if len(options) > 1:
                return self._first(spread, op, options)
            self._take(spread, op, options)
        return spread

    def _first(self, spread: Spread, op: fx.Node, options: list[Option]) -> Spread:
        """Return the first way that comes to rest."""
        reason: Refused | None = None
        for option in options:
            attempt = spread.copy()
            try:
                self._take(attempt, op, [option])
                return self._settle(attempt)
            except Refused as refused:
                reason = reason or refused
        assert reason is not None
        raise reason

    def _take(self, spread: Spread, op: fx.Node, options: list[Option]) -> None:
        if not options:
            raise Refused(f"{self.label(op)} broadcasts it")
        for wire, gauge in options[0].gauges:
            self._enter(spread, wire, gauge)
        for port, gauge in options[0].deposits:
            spread.deposits[op.name, port] = gauge

    def _enter(self, spread: Spread, wire: fx.Node, gauge: Gauge) -> None:
        known = spread.gauges.get(wire)
        if known is not None:
            if not known.same(gauge):
                raise Refused(f"'{wire.name}' would have to change in two ways")
            return
        if gauge.is_identity():
            return
        if not self.is_pure(wire):
            raise Refused(f"'{wire.name}' is written in place while others read it")
        spread.gauges[wire] = gauge
        for op in (wire, *value_readers(wire)):
            queue = spread.late if len(op.all_input_nodes) > 1 else spread.order
            if op not in queue:
                queue.append(op)

    def options(self, op: fx.Node, gauges: Known) -> list[Option]:
        """Return the ways in which an operation can come to terms with its gauges."""
        wires = dict.fromkeys((*op.all_input_nodes, op))
        known = {wire: gauges[wire] for wire in wires if wire in gauges}
        if op.op == "output":
            raise Refused("an output of the network would change")
        if op.op == "placeholder":
            raise Refused(f"it comes from {self.label(op)}")
        state = self.ledger.maps.get(op.name)
        if state is not None:
            return [self.through_map(op, state, known)]
        carrier = self.carrier(op)
        if carrier is not None:
            take = self.into_table if isinstance(carrier, Table) else self.into_carrier
            return [take(op, carrier, known)]
        found = operands(op)
        if found is not None:
            kind, left, right = found
            if isinstance(left, fx.Node) and isinstance(right, fx.Node):
                if op.target in ADDS:
                    return addition(self, op, left, right, -1 if kind == "sub" else 1, known)
                if kind == "mul":
                    return product(self, op, left, right, known)
        rule = find_rule(self, op)
        if rule is None:
            raise Refused(f"{self.label(op)} takes neither scale nor shift")
        return rule(self, op, known)

    def carrier(self, op: fx.Node) -> Weighted | None:
        """Return the layer that an operation is; raises Refused where it cannot take anything."""
        if op not in self._carriers:
            try:
                found = read_carrier(self.module, op, self.called(op))
                if isinstance(found, Table):
                    check_own(self.uses, self.modules, op, found)
                    if op.op == "get_attr" and self.memory.writes.intersection(
                        self.memory.group(op)
                    ):
                        raise Refused(f"{found.label} is written to")
                elif found is not None:
                    check_alone(self.uses, self.modules, op, found)
                self._carriers[op] = found
            except Refused as refused:
                self._carriers[op] = refused
        result = self._carriers[op]
        if isinstance(result, Refused):
            raise result
        return result

    def into_carrier(self, op: fx.Node, carrier: Weighted, known: Known) -> Option:
        """Deposit what is known of a layer's input and output in its weights."""
        deposits: list[tuple[str, Gauge]] = []
        for wire, gauge in known.items():
            port = "out" if wire is op else self._input_port(op, carrier, wire, gauge)
            if wire is not op:
                axis, count = input_axis(self.shapes, op, carrier, wire), carrier.inputs
            else:
                axis, count = output_axis(self.shapes, op, carrier), carrier.channels
            if gauge.axis is not None:
                side = "output" if wire is op else "input"
                if axis is None:
                    raise Refused(
                        f"the rank of the {side} of {carrier.label} is not known, and so not which "
                        "axis holds its channels: trace with example inputs, for example "
                        "ds.apply(model, ds.FoldAffine(), example_inputs=(x,))"
                    )
                if axis != gauge.axis or count != len(gauge.vector):
                    raise Refused(
                        f"axis {gauge.axis} of the {side} of {carrier.label} is mapped, and its "
                        f"channels are on axis {axis}"
                    )
            deposits.append((port, gauge))
        return Option((), tuple(deposits))

    def into_table(self, op: fx.Node, carrier: Weighted, known: Known) -> Option:
        """Deposit what is known of stored values, or of an embedding's rows, in them."""
        assert isinstance(carrier, Table)
        if set(known) != {op}:
            raise Refused(f"{carrier.label} reads it as indices")
        gauge, axis = known[op], None
        if gauge.part == "shift" and carrier.scale_only:
            raise Refused(carrier.scale_only)
        if carrier.positive and not bool((gauge.vector >= 0).all()):
            raise Refused(f"{carrier.label} takes the largest row, and no negative scale")
        if gauge.axis is not None:
            axis, count = gauge.axis, carrier.weight.shape[-1]
            if carrier.module is None:
                state = self.ledger.layers.get(op.name)
                old = getattr(None if state is None else state.carrier, "axis", None)
                axis, count = axis if old is None else old, carrier.weight.shape[axis]
            else:
                rank = self.shapes.rank(op)
                axis = None if rank is None else rank - 1
            if axis != gauge.axis or count != len(gauge.vector):
                raise Refused(f"axis {gauge.axis} of {carrier.label} is mapped, not axis {axis}")
        return Option((), (("out", gauge),))

    def _input_port(self, op: fx.Node, carrier: Weighted, wire: fx.Node, gauge: Gauge) -> str:
        """Return how a layer takes a gauge of its input; raises Refused where it cannot."""
        if carrier.weight.ndim == 1:
            raise Refused(f"{carrier.label} normalises it away")
        if wire is not next(v for v in op.all_input_nodes if v not in carrier.operands):
            raise Refused(f"{carrier.label} reads it as a weight")
        if gauge.part == "shift" and carrier.spatial is not None:
            if carrier.transposed:
                raise Refused(f"{carrier.label} has windows of different sizes, so no shift")
            if is_padded(op, self.called(op)):
                known = "tensor_meta" in op.meta and "tensor_meta" in wire.meta
                if not self.borders or not known or not is_plain_conv(op, self.called(op)):
                    raise Refused(f"{carrier.label} pads with zeros, which a shift does not pass")
                return "border"
        return "in"

    def through_map(self, op: fx.Node, state: MapState, known: Known) -> Option:
        """Another affine map takes what it does itself, and hands on the rest."""
        data, tail = state.read.data, state.read.tail
        tail_known = all(is_homogeneous(self.modules[f"{op.target}.{name}"]) for name in tail)
        for wire, gauge in known.items():
            if wire is op and tail:
                if not tail_known or gauge.part == "shift":
                    raise Refused(f"{self.label(op)} ends in an activation")
                if not bool((gauge.vector >= 0).all()):
                    raise Refused(f"the activation of {self.label(op)} passes no negative scale")
            if wire not in (op, data):
                raise Refused(f"{self.label(op)} reads it as a parameter")
            axes = {gauge.axis, state.axis} - {None}
            if len(axes) > 1 and not state.is_gone:
                raise Refused(f"{self.label(op)} maps another axis")
        part = next(iter(known.values())).part
        if state.scales if part == "scale" else state.shifts:
            self._check_takes(op, state, known)
            return Option((), tuple(("out" if w is op else "in", g) for w, g in known.items()))
        back = data not in known
        gauge = known[op if back else data]
        if part == "shift" and state.scales:
            step = "over" if back else "times"
            scale = state.affine.scale
            vector = gauge.vector / scale if back else gauge.vector * scale
            gauge = gauge.then(step, op.name, axis=gauge.axis or state.axis, vector=vector)
        if tail and not back and (part == "shift" or not tail_known):
            raise Refused(f"{self.label(op)} ends in an activation")
        if tail and not back and not bool((gauge.vector >= 0).all()):
            raise Refused(f"the activation of {self.label(op)} passes no negative scale")
        deposits: tuple[tuple[str, Gauge], ...] = ()
        if part == "scale" and state.shifts:
            self._check_takes(op, state, known)
            deposits = (("through", gauge),)
        return Option(((data if back else op, gauge),), deposits)

    def _check_takes(self, op: fx.Node, state: MapState, known: Known) -> None:
        """Raise Refused where a map stays as it is, or has no channels to put a vector on."""
        rank = self.shapes.rank(state.read.data)
        if norm_function(op, self.called(op)) is not None and rank not in NORM_LAYERS:
            raise Refused(f"the rank of '{op.name}' is not known: trace with example inputs")
        for gauge in known.values():
            size = len(state.affine.scale)
            if gauge.axis is not None and size not in (1, len(gauge.vector)):
                raise Refused(f"{self.label(op)} has {size} channels")
            unknown = state.read.norm is None and rank is None
            if gauge.axis is not None and unknown:
                raise Refused(f"the rank of '{op.name}' is not known: trace with example inputs")

    def of_operand(self, wire: fx.Node, node: fx.Node, gauge: Gauge) -> Gauge | None:
        """Return what a gauge of an elementwise operation is on an operand, or on itself.

        None where the operand is broadcast along the channels, or its shape is not known.
        """
        if gauge.axis is None or wire is node:
            return gauge
        here, there = self.shapes.shape(wire), self.shapes.shape(node)
        if here is None or there is None:
            return None
        axis = gauge.axis - len(there) + len(here)
        if axis < 0 or not here[axis] == len(gauge.vector) == there[gauge.axis]:
            return None
        return gauge.moved(axis)

    def of_result(self, wire: fx.Node, node: fx.Node, gauge: Gauge) -> Gauge | None:
        """Return what a gauge of an operand, or of the operation itself, is on the operation."""
        if gauge.axis is None or wire is node:
            return gauge
        here, there = self.shapes.shape(wire), self.shapes.shape(node)
        if here is None or there is None:
            return None
        axis = gauge.axis + len(there) - len(here)
        if not here[gauge.axis] == len(gauge.vector) == there[axis]:
            return None
        return gauge.moved(axis)

    def distance(self, wire: fx.Node, node: fx.Node) -> int:
        """Return how far a gauge on this operand would go: layers of its own come first."""
        if wire is node:
            return 1
        alone = len(value_readers(wire)) == 1
        try:
            return 0 if alone and self.carrier(wire) is not None else 2
        except Refused:
            return 2

    def is_pure(self, wire: fx.Node) -> bool:
        """Say whether in-place writes into a value's memory act as if they made new values."""
        if wire not in self._pure:
            group = self.memory.group(wire)
            self._pure.update(dict.fromkeys(group, is_pure(self.memory, group)))
        return self._pure[wire]

    def is_identity(self, node: fx.Node) -> bool:
        """Say whether a node returns its input as it is: a drop layer in eval, `nn.Identity`."""
        return node.op != "placeholder" and identity_input(node, self.called(node)) is not None

    def joined(self, node: fx.Node, data: fx.Node) -> None:
        """Note that a map is gone, so that its output is its input."""
        self.memory.join(node, data)
        self._pure.clear()

    def label(self, node: fx.Node) -> str:
        """Name a node for people: what it calls, and the path of that or its own name."""
        return label(node, self.called(node))


def is_pure(memory: Memory, group: list[fx.Node]) -> bool:
    """Say whether nobody reads a value of a group after another one of it was written.

    A write whose old value nobody reads any more is a new value that happens to lie in the same
    memory: each reader sees what it would see, were there no writes in place.
    """
    order = memory.order
    for write in (node for node in group if node in memory.writes):
        for member in group:
            if order[member] < order[write] and any(
                order[reader] > order[write] for reader in value_readers(member)
            ):
                return False
    return True


def label(node: fx.Node, called: nn.Module | None) -> str:
    """Name a node for people: what it calls, and the path of that or its own name."""
    if called is not None:
        return f"{type(called).__name__} '{node.target}'"
    if not node.op.startswith("call"):
        return f"{node.op} '{node.name}'"
    return f"{getattr(node.target, '__name__', str(node.target))} '{node.name}'"
