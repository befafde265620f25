"""Reading what is linear in a graph: layers, gains and sums, and what they make of one value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from dropsurgery.graph.affine import (
    Affine,
    Refused,
    argument,
    identity_input,
    is_norm,
    read_norm,
)
from dropsurgery.graph.channels import Shapes, traced_shape
from dropsurgery.graph.constants import constant
from dropsurgery.graph.ops import Kind, kind_of, writes_in_place
from dropsurgery.graph.pieces import (
    Gain,
    Layer,
    Piece,
    Same,
    Sum,
    Unread,
    layer_piece,
    operands,
    pad_piece,
    pool_piece,
)
from dropsurgery.graph.stencil import Kernel, Stencil
from dropsurgery.graph.weighted import read_weighted


@dataclass(frozen=True)
class Source:
    """What is known of a value that others are computed from.

    Attributes:
        spatial: number of spatial axes, behind the channels; 0 where the channels are on the last.
        channels: number of channels.
        node: the value.
    """

    spatial: int
    channels: int
    node: fx.Node


class Linear:
    """Reads the linear operations of a graph.

    Args:
        module: the traced module.
        modules: its modules by path.
        shapes: what is known of the shapes of its graph.
    """

    def __init__(
        self, module: fx.GraphModule, modules: Mapping[str, nn.Module], shapes: Shapes
    ) -> None:
        self.module = module
        self.modules = modules
        self.shapes = shapes
        self._pieces: dict[fx.Node, Piece | None] = {}
        self._sources: dict[fx.Node, Source | None] = {}

    def called(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, else None."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def piece(self, node: fx.Node) -> Piece | None:
        """Return what a node does, where that is linear."""
        if node not in self._pieces:
            self._pieces[node] = self._read(node)
        return self._pieces[node]

    def _read(self, node: fx.Node) -> Piece | None:
        if not node.op.startswith("call_"):
            return None
        called = self.called(node)
        if is_norm(node, called):
            return self._norm(node, called)
        if node.op != "call_module" and writes_in_place(self.module, node):
            return None
        data = identity_input(node, called)
        if data is not None:
            return Same(data)
        try:
            weighted = read_weighted(self.module, node, called)
        except Refused as refused:
            data = argument(node, 0, "input")
            return Unread(data, str(refused)) if isinstance(data, fx.Node) else None
        if weighted is not None:
            return layer_piece(node, called, weighted)
        return pool_piece(node, called) or pad_piece(node, called) or self._arithmetic(node)

    def _norm(self, node: fx.Node, called: nn.Module | None) -> Piece | None:
        try:
            norm = read_norm(self.module, node, called)
        except Refused as refused:
            data = argument(node, 0, "input")
            return Unread(data, str(refused)) if isinstance(data, fx.Node) else None
        return None if norm.tail else Gain(norm.data, norm)

    def _arithmetic(self, node: fx.Node) -> Piece | None:
        kind = kind_of(self.module, node)
        name = getattr(node.target, "__name__", str(node.target))
        operands = [argument(node, 0, "input"), argument(node, 1, "other")]
        if name == "neg" and isinstance(operands[0], fx.Node):
            return Gain(operands[0], factor=-1.0)
        plain = set(node.kwargs) <= {"input", "other"} and len(node.args) <= 2
        if kind not in (Kind.ADD, Kind.SUB, Kind.PRODUCT) or not plain:
            return None
        values = [constant(self.module, operand) for operand in operands]
        left, right = operands
        sign = -1.0 if kind is Kind.SUB else 1.0
        if values[0] is None and values[1] is None:
            nodes = isinstance(left, fx.Node) and isinstance(right, fx.Node)
            return Sum(left, right, sign) if nodes and kind is not Kind.PRODUCT else None
        data, value = (left, values[1]) if values[0] is None else (right, values[0])
        both = values[0] is not None and values[1] is not None
        if not isinstance(data, fx.Node) or value is None or both:
            return None
        is_number = not isinstance(left if data is right else right, fx.Node)
        amount: Tensor | float = float(value) if is_number else value
        if kind is Kind.PRODUCT:
            return _product(name.strip("_"), data, amount, is_left=data is left)
        if data is left:
            return Gain(data, summand=sign * amount)
        return Gain(data, factor=sign, summand=amount)

    def behind_same(self, node: fx.Node) -> fx.Node:
        """Return the node that computes a value, behind operations that return their operand."""
        piece = self.piece(node)
        while isinstance(piece, Same):
            node = piece.data
            piece = self.piece(node)
        return node

    def source(self, node: fx.Node) -> Source | None:
        """Return channels and spatial axes of a value, as the layers that read it tell them."""
        if node not in self._sources:
            self._sources[node] = self._find_source(node)
        return self._sources[node]

    def _find_source(self, node: fx.Node) -> Source | None:
        found = self._first_reader(node)
        if found is None:
            return None
        spatial, channels = found
        shape = traced_shape(node)
        if shape is not None and (len(shape) <= spatial or shape[-spatial - 1] != channels):
            return None
        rank = self.shapes.certain_rank(node)
        if spatial and (self.shapes.contradicts() or rank not in (None, spatial + 1, spatial + 2)):
            return None
        return Source(spatial, channels, node)

    def _first_reader(self, node: fx.Node) -> tuple[int, int] | None:
        """Return (spatial axes, channels) of the first layer with weights that a value comes to."""
        seen, waiting = {node}, [node]
        while waiting:
            value = waiting.pop(0)
            for user in value.users:
                piece = self.piece(user)
                if isinstance(piece, Layer) and piece.weighted is not None:
                    if piece.data is value:
                        weighted = piece.weighted
                        return len(piece.axes), weighted.weight.shape[1] * weighted.groups
                elif _keeps_channels(piece) and user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return None

    def affine(self, gain: Gain, source: Source, channels: int) -> Affine:
        """Return the map that a gain is on a value with the spatial axes of `source`.

        Raises:
            Refused: it is not one for each channel.
        """
        if gain.norm is None:
            factor = self._per_channel(gain.factor, source, channels)
            summand = self._per_channel(gain.summand, source, channels)
            return Affine(factor, summand.to(factor.device))
        norm = gain.norm
        rank = self._rank(source)
        if source.spatial == 0 and rank != 2:
            raise Refused(f"{norm.label} normalises axis 1, which may not be the last one")
        if rank is None or rank < source.spatial + 2 or rank not in (norm.ranks or (rank,)):
            raise Refused(f"{norm.label} normalises axis 1, which is not that of the channels")
        if norm.mean.numel() != channels:
            raise Refused(f"{norm.label} has {norm.mean.numel()} features for {channels} channels")
        return norm.affine()

    def _rank(self, source: Source) -> int | None:
        """Return the number of axes; a convolution is taken to be batched."""
        if source.spatial == 0:
            return self.shapes.rank(source.node)
        return self.shapes.certain_rank(source.node) or source.spatial + 2

    def _per_channel(self, value: Tensor | float, source: Source, channels: int) -> Tensor:
        """Return a constant that is broadcast over a value as one entry for each channel."""
        if not isinstance(value, Tensor):
            return torch.full((channels,), float(value), dtype=torch.float64)
        if value.ndim > 1 and value.ndim > (self._rank(source) or 1):
            raise Refused("a constant has more axes than what it is combined with")
        if value.numel() == 1:
            return value.double().reshape(1).expand(channels).clone()
        padded = (1,) * (source.spatial + 1 - value.ndim) + tuple(value.shape)
        if padded[len(padded) - source.spatial - 1] != channels or value.numel() != channels:
            raise Refused("a constant is not one number for each channel")
        return value.double().flatten()

    def kernel(self, node: fx.Node, source: fx.Node) -> Kernel:
        """Return what a node is of another, in float64 (see `dropsurgery.graph.forms`)."""
        known = self.source(source)
        assert known is not None
        order = list(between(self, node, source))
        uses = Counter(v for value in order for v in operands(self.piece(value)))
        device = self._device(order)
        kernels = {source: _identity(known, device)}

        def operand(value: fx.Node) -> Kernel:
            kernel = kernels[value]
            return kernel if uses[value] == 1 else replace(kernel, is_own=False)

        for value in order:
            piece = self.piece(value)
            if isinstance(piece, Same):
                kernels[value] = operand(piece.data)
            elif isinstance(piece, Gain):
                inner = operand(piece.data)
                affine = self.affine(piece, known, inner.form.outputs)
                on_device = Affine(affine.scale.to(device), affine.shift.to(device))
                kernels[value] = inner.then(on_device)
            elif isinstance(piece, Sum):
                left, right = operand(piece.left), operand(piece.right)
                kernels[value] = left.plus(right, piece.sign)
            else:
                assert isinstance(piece, Layer)
                inner = operand(piece.data)
                outer = piece.kernel(known.spatial, inner.form.outputs)
                outer = replace(outer, weight=outer.weight.to(device), bias=outer.bias.to(device))
                # The source itself is the identity, and weights may be large.
                kernels[value] = outer if piece.data is source else outer.behind(inner)
        return kernels[node]

    def bounds(self, node: fx.Node, source: fx.Node) -> tuple[float, float]:
        """Return what no entry of the weight and of the bias of a `kernel` exceeds."""
        known = self.source(source)
        assert known is not None
        found = {source: (1.0, 0.0, known.channels)}
        for value in between(self, node, source):
            piece = self.piece(value)
            if isinstance(piece, Same):
                found[value] = found[piece.data]
            elif isinstance(piece, Gain):
                weight, bias, channels = found[piece.data]
                affine = self.affine(piece, known, channels)
                scale, shift = float(affine.scale.abs().max()), float(affine.shift.abs().max())
                found[value] = (weight * scale, bias * scale + shift, channels)
            elif isinstance(piece, Sum):
                left, right = found[piece.left], found[piece.right]
                found[value] = (left[0] + right[0], left[1] + right[1], left[2])
            else:
                assert isinstance(piece, Layer)
                weight, bias, channels = found[piece.data]
                form = piece.form(known.spatial, channels)
                peak, shift = piece.peaks()
                fan = form.numel // form.outputs
                found[value] = (weight * peak * fan, bias * peak * fan + shift, form.outputs)
        return found[node][:2]

    def _device(self, order: list[fx.Node]) -> torch.device:
        """Return the device of the layers among nodes."""
        for value in order:
            piece = self.piece(value)
            if isinstance(piece, Layer) and piece.weighted is not None:
                return piece.weighted.weight.device
        return torch.device("cpu")


def _keeps_channels(piece: Piece | None) -> bool:
    """Say whether a value has the channels of what it was computed from, without broadcasting."""
    if isinstance(piece, Gain):
        return all(tensor.numel() == 1 for tensor in piece.tensors) or piece.norm is not None
    return isinstance(piece, Same | Layer)


def between(linear: Linear, node: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that compute one value from another, in an order in which they can run."""
    done, stack = {source}, [node]
    while stack:
        current = stack[-1]
        waiting = [value for value in operands(linear.piece(current)) if value not in done]
        if current in done or not waiting:
            stack.pop()
            if current not in done:
                done.add(current)
                yield current
        else:
            stack += waiting


def _identity(source: Source, device: torch.device) -> Kernel:
    form = Stencil.identity(source.spatial, source.channels)
    weight = torch.ones(form.shape, dtype=torch.float64, device=device)
    return Kernel(form, weight, weight.new_zeros(form.outputs))


def _product(name: str, data: fx.Node, value: Tensor | float, *, is_left: bool) -> Gain | None:
    if name in ("mul", "imul"):
        return Gain(data, factor=value)
    if name in ("truediv", "itruediv", "div") and is_left:
        if not isinstance(value, Tensor):
            return Gain(data, factor=1.0 / value) if value else None
        return Gain(data, factor=value.double().reciprocal().to(torch.float64))
    return None
