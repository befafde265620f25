"""What became of every affine map and of every layer, while maps travel: vectors, no weights.

The same book is kept by the planner, which decides with it, and by the surgeon, who writes the
weights from it at the end: each weight is computed once, in float64, and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from dropsurgery.graph.affine import Affine, Refused
from dropsurgery.graph.carriers import conv_options, read_carrier
from dropsurgery.graph.channel_maps import ChannelMap, read_map
from dropsurgery.graph.gauge import Part, Path, evaluate
from dropsurgery.graph.stored import Table
from dropsurgery.graph.weighted import Weighted, loses_precision

Port = Literal["in", "out", "through", "border"]
# Half precision ends at 65504: a summand that takes a good part of that is no gain.
_LARGEST_HALF = 2.0**12


@dataclass(frozen=True)
class Deposit:
    """A vector that goes into a layer or into another map.

    Attributes:
        node: the node that takes it.
        port: whether the value that it returns changes ("out") or the one that it reads ("in");
            "through" both, and what it adds has to follow; "border" the one that it reads, but
            not the zeros that it pads with.
        axis: the axis of that value; None where one number goes for all channels.
        path: how the vector comes from the one that moved.
    """

    node: str
    port: Port
    axis: int | None
    path: Path


@dataclass(frozen=True)
class Move:
    """One part of an affine map y = s·x + t leaves its place.

    Back: x becomes s·x, or x + t/s. Forward: y becomes y/s, or y - t.

    Attributes:
        source: the node of the map.
        part: "scale" or "shift".
        forward: whether the map's output changes, and not its input.
        deposits: where the vector ends.
    """

    source: str
    part: Part
    forward: bool
    deposits: tuple[Deposit, ...]


@dataclass(frozen=True)
class MapState:
    """What a map has become.

    Attributes:
        read: the map as the network has it.
        axis: the axis of its channels, from the front; None for one number, or where not proved.
        affine: scale and shift now.
        scales: whether it still multiplies.
        shifts: whether it still adds.
        touched: whether another map was put into it.
    """

    read: ChannelMap
    axis: int | None
    affine: Affine
    scales: bool
    shifts: bool
    touched: bool = False

    @property
    def is_gone(self) -> bool:
        """Whether nothing of it is left."""
        return not self.scales and not self.shifts


@dataclass(frozen=True)
class LayerState:
    """What a layer has to take in.

    Attributes:
        carrier: the layer as the network has it.
        before: the map of its input.
        after: the map of its output.
        border: what is added to its input, but not to the zeros that it pads with.
    """

    carrier: Weighted
    before: Affine | None = None
    after: Affine | None = None
    border: Tensor | None = None

    def absorbed(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias with everything in them."""
        return self.carrier.absorb(self.after or _nothing(), self.before)

    def table(self) -> Tensor:
        """Return a stored tensor with everything in it."""
        assert isinstance(self.carrier, Table)
        return self.carrier.taken(self.after or _nothing())

    def lost(self) -> str | None:
        """Return why the dtype cannot hold the new values, or None."""
        after = self.after or _nothing()
        if isinstance(self.carrier, Table):
            return self.carrier.lost(after)
        return loses_precision(self.carrier, after, self.before)

    @property
    def adds(self) -> bool:
        """Whether it has to add something, for which a layer without a bias has no place."""
        parts = (self.before, self.after)
        return any(part is not None and bool(part.shift.any()) for part in parts)

    def border_map(self, node: fx.Node, size: Sequence[int]) -> Tensor:
        """Return what the border's summand adds to the output, in float64: (C, H, W).

        Args:
            node: the convolution.
            size: the input's spatial sizes, on which it depends.
        """
        assert self.border is not None
        shape = (1, self.carrier.inputs) + (1,) * len(size)
        values = self.border.expand(self.carrier.inputs).view(shape).expand(*shape[:2], *size)
        weight = self.carrier.weight.detach().double()
        values = values.to(weight.device)
        if self.carrier.module is not None:
            zeros = weight.new_zeros(self.carrier.channels)
            state = (
                {"weight": weight}
                if self.carrier.bias is None
                else {"weight": weight, "bias": zeros}
            )
            found = functional_call(self.carrier.module, state, (values,))[0]
        else:
            convolve: Any = node.target
            found = convolve(values, weight, None, *conv_options(node))[0]
        scale = (self.after or _nothing()).scale
        return found * scale.view((-1,) + (1,) * len(size))

    def same(self, other: LayerState) -> bool:
        """Say whether two calls of one layer get the same weights."""
        pairs = ((self.before, other.before), (self.after, other.after))
        alone = self.border is None and other.border is None
        return alone and all(
            _equal(left or _nothing(), right or _nothing()) for left, right in pairs
        )


def _on_axis(carrier: Weighted, axis: int | None) -> Weighted:
    """Return a stored tensor whose channels' axis a deposit settles; layers as they are."""
    if isinstance(carrier, Table) and carrier.axis is None and axis is not None:
        return replace(carrier, axis=axis)
    return carrier


def _nothing() -> Affine:
    return Affine(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


def _equal(left: Affine, right: Affine) -> bool:
    pairs = ((left.scale, right.scale), (left.shift, right.shift))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


class Ledger:
    """The maps and layers of a graph, and the vectors that they have to take in.

    Args:
        root: the module whose paths the nodes name.
        nodes: the nodes of its graph by name.
        modules: the modules of `root` by path.
    """

    def __init__(
        self, root: fx.GraphModule, nodes: Mapping[str, fx.Node], modules: Mapping[str, nn.Module]
    ) -> None:
        self.root, self.nodes, self.modules = root, nodes, modules
        self.maps: dict[str, MapState] = {}
        self.layers: dict[str, LayerState] = {}

    def called(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, else None."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def read(self, name: str) -> None:
        """Enter a node that a move names, as the network has it."""
        if name in self.maps or name in self.layers:
            return
        node = self.nodes[name]
        called = self.called(node)
        found = read_map(self.root, node, called)
        if found is not None:
            self.add_map(name, found, None)
            return
        carrier = read_carrier(self.root, node, called)
        if carrier is None:
            raise Refused(f"'{name}' has no weights")
        self.layers[name] = LayerState(carrier)

    def add_map(self, name: str, found: ChannelMap, axis: int | None) -> None:
        """Enter a map whose axis is known."""
        self.maps[name] = MapState(found, axis, found.affine, found.scales, found.shifts)

    def start(self, source: str, part: Part, forward: bool) -> Tensor:
        """Return the vector that leaves a map."""
        affine = self.maps[source].affine
        if part == "scale":
            return affine.scale
        return -affine.shift if forward else affine.shift / affine.scale

    def scale_of(self, name: str) -> Tensor:
        """Return what a map multiplies with."""
        self.read(name)
        return self.maps[name].affine.scale

    def apply(self, move: Move) -> dict[str, MapState | LayerState]:
        """Carry a move out; return what was there before, for `restore`."""
        old: dict[str, MapState | LayerState] = {}
        start = self.start(move.source, move.part, move.forward)
        for deposit in move.deposits:
            self.read(deposit.node)
            vector = evaluate(deposit.path, start, move.part, self.scale_of)
            state: Any = self.maps.get(deposit.node) or self.layers[deposit.node]
            old.setdefault(deposit.node, state)
            divides = move.part == "scale" and (move.forward != (deposit.port == "in"))
            if divides:
                vector = 1.0 / vector
            if isinstance(state, MapState):
                affine = _deposited(state.affine, deposit.port, move.part, vector)
                axis = state.axis if deposit.axis is None else deposit.axis
                changed = replace(state, affine=affine, axis=axis, touched=True)
                self.maps[deposit.node] = changed
            elif deposit.port == "border":
                inner = (state.before or _nothing()).scale * vector
                border = -inner if state.border is None else state.border - inner
                self.layers[deposit.node] = replace(state, border=border)
            else:
                name = "before" if deposit.port == "in" else "after"
                affine = getattr(state, name) or _nothing()
                affine = _deposited(affine, deposit.port, move.part, vector)
                carrier = _on_axis(state.carrier, deposit.axis)
                self.layers[deposit.node] = replace(state, carrier=carrier, **{name: affine})
        state = self.maps[move.source]
        old.setdefault(move.source, state)
        self.maps[move.source] = _left(state, move)
        return old

    def restore(self, old: Mapping[str, MapState | LayerState]) -> None:
        """Take a move back."""
        for name, state in old.items():
            if isinstance(state, MapState):
                self.maps[name] = state
            else:
                self.layers[name] = state

    def check(self, names: Iterable[str]) -> None:
        """Raise Refused where what these nodes are to hold is not held by their dtype."""
        for name in names:
            state = self.layers.get(name)
            if state is not None:
                for affine in (state.before, state.after):
                    if affine is not None and not _finite(affine):
                        raise Refused(
                            f"{state.carrier.label} would take in numbers that are not finite"
                        )
                reason = state.lost()
                if reason is not None:
                    raise Refused(f"{reason}, in {state.carrier.label}")
            elif not _finite(self.maps[name].affine):
                raise Refused(f"{self.maps[name].read.label} has a scale of zero")


def held_in(affine: Affine, dtype: torch.dtype) -> bool:
    """Say whether a dtype holds what stays of a map."""
    limit = _LARGEST_HALF if dtype == torch.float16 else torch.finfo(dtype).max
    values = torch.cat((affine.scale, affine.shift)).abs()
    scale = affine.scale.abs()
    vanishes = bool(((scale < torch.finfo(dtype).tiny) & (scale > 0)).any())
    return bool((values <= limit).all()) and not vanishes


def _finite(affine: Affine) -> bool:
    return bool(affine.scale.isfinite().all()) and bool(affine.shift.isfinite().all())


def _deposited(affine: Affine, port: Port, part: Part, vector: Tensor) -> Affine:
    """Return a map with a vector in it.

    Behind the map, s·x + t becomes v(s·x + t) or s·x + t + v. Before it, where x = x'·v or x' - v:
    (s·v)x' + t or s·x' + t - s·v. The map before a layer is written as x = s·x' + t, where x' is
    x'' times v, or x'' - v: the same.
    """
    scale, shift = affine.scale, affine.shift
    if part == "shift":
        return Affine(scale, shift + vector if port == "out" else shift - scale * vector)
    if port == "in":
        return Affine(scale * vector, shift)
    if port == "out":
        return Affine(scale * vector, shift * vector)
    return Affine(scale, shift * vector)


def _left(state: MapState, move: Move) -> MapState:
    """Return what stays of a map when a part of it has left."""
    scale, shift = state.affine.scale, state.affine.shift
    if move.part == "shift":
        return replace(state, affine=Affine(scale, torch.zeros_like(shift)), shifts=False)
    if state.shifts and move.forward:
        shift = shift / scale
    return replace(state, affine=Affine(torch.ones_like(scale), shift), scales=False)
