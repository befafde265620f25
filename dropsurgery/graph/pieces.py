"""Linear operations: what one node does, where that is linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dropsurgery.graph.affine import Norm, Refused, argument
from dropsurgery.graph.leaves import forward_owner, has_hooks
from dropsurgery.graph.stencil import POINT, Axis, Kernel, Stencil
from dropsurgery.graph.weighted import Weighted


@dataclass(frozen=True)
class Same:
    """An operation that returns its operand."""

    data: fx.Node


@dataclass(frozen=True)
class Gain:
    """y = s·x + t for every channel: a BatchNorm, or arithmetic with a constant.

    Attributes:
        data: the operand.
        norm: the BatchNorm, or None.
        factor: s; a number, or a tensor that is broadcast over the operand.
        summand: t, likewise.
    """

    data: fx.Node
    norm: Norm | None = None
    factor: Tensor | float = 1.0
    summand: Tensor | float = 0.0

    @property
    def shifts(self) -> bool:
        """Whether it may add a constant."""
        return self.norm is not None or isinstance(self.summand, Tensor) or self.summand != 0.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that it has."""
        own = self.norm.tensors if self.norm is not None else ()
        return (*own, *(t for t in (self.factor, self.summand) if isinstance(t, Tensor)))


@dataclass(frozen=True)
class Layer:
    """A convolution, a linear layer, an average over windows, or padding with zeros.

    Attributes:
        data: the operand.
        axes: the spatial axes of its stencil.
        border: how it pads; None where it does not.
        weighted: its weights; None where it has none and works on each channel by itself.
        value: what each weight is, without weights.
    """

    data: fx.Node
    axes: tuple[Axis, ...]
    border: str | None
    weighted: Weighted | None = None
    value: float = 1.0

    def form(self, spatial: int, channels: int) -> Stencil:
        """Return its stencil on a value with this many spatial axes and channels.

        Raises:
            Refused: it works on other axes.
        """
        missing = spatial - len(self.axes)
        if missing < 0 or (missing and self.weighted is not None):
            raise Refused(f"it works on {len(self.axes)} axes and others on {spatial}")
        if self.weighted is None:
            axes = (POINT,) * missing + self.axes
            return Stencil(axes, channels, channels, channels, self.border)
        layer = self.weighted
        inputs = layer.weight.shape[1] * layer.groups
        shifts = layer.bias is not None
        return Stencil(self.axes, inputs, layer.channels, layer.groups, self.border, shifts)

    def peaks(self) -> tuple[float, float]:
        """Return the largest |weight| and |bias|."""
        if self.weighted is None:
            return abs(self.value), 0.0
        bias = self.weighted.bias
        shift = 0.0 if bias is None else float(bias.detach().abs().max())
        return float(self.weighted.peaks().max()), shift

    def kernel(self, spatial: int, channels: int) -> Kernel:
        """Return its stencil with its values."""
        form = self.form(spatial, channels)
        if self.weighted is None:
            weight = torch.full(form.shape, self.value, dtype=torch.float64)
        else:
            weight = self.weighted.weight.detach()
        bias = None if self.weighted is None else self.weighted.bias
        if bias is None:
            zeros = torch.zeros(form.outputs, dtype=torch.float64, device=weight.device)
            return Kernel(form, weight, zeros)
        return Kernel(form, weight, bias.detach().double())


@dataclass(frozen=True)
class Sum:
    """Two operands, the second with a sign."""

    left: fx.Node
    right: fx.Node
    sign: float = 1.0


@dataclass(frozen=True)
class Unread:
    """A layer that is linear, as far as its kind goes, but cannot be read."""

    data: fx.Node
    reason: str


Piece = Same | Gain | Layer | Sum | Unread


def operands(piece: Piece | None) -> tuple[fx.Node, ...]:
    """Return the values that a piece is computed from."""
    if piece is None:
        return ()
    return (piece.left, piece.right) if isinstance(piece, Sum) else (piece.data,)


_SAME_CONVS = frozenset(f"torch.nn.modules.conv.Conv{axes}d" for axes in (1, 2, 3))
_SAME_LINEARS = frozenset({"torch.nn.modules.linear.Linear", "timm.layers.linear.Linear"})


def layer_piece(node: fx.Node, called: nn.Module | None, weighted: Weighted) -> Piece | None:
    """Read a convolution or linear layer."""
    data = argument(node, 0, "input")
    if not isinstance(data, fx.Node):
        return None
    if weighted.spatial is None:
        owner = "" if called is None else forward_owner(called)
        same = called is None or owner in _SAME_LINEARS
        return Layer(data, (), None, weighted) if same else Unread(data, "its forward is its own")
    if weighted.transposed:
        return None
    mode = "zeros"
    if called is None:
        given = [argument(node, at, name, default) for at, name, default in _CONV_ARGUMENTS]
    elif forward_owner(called) in _SAME_CONVS:
        state: Any = called
        given, mode = [state.stride, state.padding, state.dilation], state.padding_mode
    else:
        return Unread(data, f"{weighted.label} pads in a way of its own")
    sizes = weighted.weight.shape[2:]
    stride, dilation = (_tuple(value, len(sizes)) for value in (given[0], given[2]))
    if stride is None or dilation is None:
        return None
    pads = _paddings(given[1], tuple(sizes), dilation)
    if pads is None:
        return None
    axes = tuple(map(Axis.window, sizes, stride, dilation, *zip(*pads, strict=True)))
    return Layer(data, axes, _border(axes, mode), weighted)


_CONV_ARGUMENTS = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))


def _border(axes: tuple[Axis, ...], mode: str) -> str | None:
    return None if all(axis.is_inside for axis in axes) else mode


def _paddings(
    padding: Any, sizes: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]] | None:
    if padding == "valid":
        return [(0, 0)] * len(sizes)
    if padding == "same":
        totals = [step * (size - 1) for size, step in zip(sizes, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    pads = _tuple(padding, len(sizes))
    return None if pads is None else [(pad, pad) for pad in pads]


def _tuple(value: Any, count: int) -> tuple[int, ...] | None:
    """Read sizes that are one for all axes or one for each."""
    if isinstance(value, int):
        return (value,) * count
    if isinstance(value, tuple | list) and all(isinstance(item, int) for item in value):
        if len(value) == 1:
            return (int(value[0]),) * count
        return tuple(value) if len(value) == count else None
    return None


_POOLS: Mapping[Any, int] = {
    nn.AvgPool1d: 1,
    nn.AvgPool2d: 2,
    nn.AvgPool3d: 3,
    F.avg_pool1d: 1,
    F.avg_pool2d: 2,
    F.avg_pool3d: 3,
}
_POOL_ARGUMENTS: tuple[tuple[str, Any], ...] = (
    ("kernel_size", None),
    ("stride", None),
    ("padding", 0),
    ("ceil_mode", False),
    ("count_include_pad", True),
    ("divisor_override", None),
)


def pool_piece(node: fx.Node, called: nn.Module | None) -> Piece | None:
    """Read an average over windows: a convolution whose weights are 1/size."""
    kind = node.target if called is None else type(called)
    count, data = _POOLS.get(kind), argument(node, 0, "input")
    if count is None or not isinstance(data, fx.Node) or (called and has_hooks(called)):
        return None
    if called is None:
        given = [argument(node, at + 1, *pair) for at, pair in enumerate(_POOL_ARGUMENTS)]
    else:
        given = [getattr(called, name, default) for name, default in _POOL_ARGUMENTS]
    size, stride, padding, ceil_mode, counts_padding, divisor = given
    sizes = _tuple(size, count)
    strides = sizes if stride is None or stride == [] else _tuple(stride, count)
    pads = _tuple(padding, count)
    if sizes is None or strides is None or pads is None:
        return None
    if ceil_mode and any(step != 1 for step in strides):
        return Unread(data, "an average pooling with ceil_mode has windows of other sizes")
    if any(pads) and not counts_padding and divisor is None:
        return Unread(data, "an average pooling with count_include_pad=False weighs borders anew")
    total = 1
    for entries in sizes:
        total *= entries
    axes = tuple(map(Axis.window, sizes, strides, (1,) * count, pads, pads))
    return Layer(data, axes, _border(axes, "zeros"), value=1.0 / (divisor or total))


_PADS: tuple[type[nn.Module], ...] = (
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
)


def pad_piece(node: fx.Node, called: nn.Module | None) -> Piece | None:
    """Read padding with zeros of the last axes, taken to be all spatial axes."""
    data = argument(node, 0, "input")
    if isinstance(called, _PADS) and type(called) in _PADS and not has_hooks(called):
        state: Any = called
        pads, mode, value = state.padding, "constant", state.value
    elif node.target is F.pad:
        pads = argument(node, 1, "pad")
        mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value")
    else:
        return None
    plain = isinstance(pads, tuple | list) and all(isinstance(pad, int) for pad in pads)
    if not isinstance(data, fx.Node) or not plain or mode != "constant" or value not in (None, 0):
        return None
    ends = [(pads[at], pads[at + 1]) for at in range(0, len(pads), 2)][::-1]
    axes = tuple(Axis.window(1, 1, 1, before, after) for before, after in ends)
    return Layer(data, axes, _border(axes, "zeros"))
