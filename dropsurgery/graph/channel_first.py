"""Whether an axis of a value carries channels: what whole-channel drops need to know."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx, nn
from torch.nn import functional as F

from dropsurgery.graph.affine import is_norm
from dropsurgery.graph.channels import Shapes, axis_before_view
from dropsurgery.graph.module import called_module
from dropsurgery.graph.ops import Kind, kind_of
from dropsurgery.graph.weighted import conv_axes, conv_function
from dropsurgery.layers.drop_connect import linear

_CHANNELS_ON_AXIS_1 = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_CHANNELS_LAST = (nn.Linear, nn.MultiheadAttention, nn.RNNBase)
# Operations that leave channels where they are.
_THROUGH = frozenset(
    {Kind.DROP, Kind.NORM, Kind.POOL, Kind.ADD, Kind.SUB, Kind.PRODUCT, Kind.CONCAT, Kind.LINEAR}
)


def carries_channels(
    module: fx.GraphModule, shapes: Shapes, node: fx.Node, axis: int
) -> bool | None:
    """Say whether `axis` of a node's output carries its channels, going back to what made them.

    Args:
        module: the network.
        shapes: what is known of the shapes of the node's graph.
        node: the node.
        axis: an axis, counted from the front.

    Returns:
        None where it is not proved either way.
    """
    seen = set[tuple[fx.Node, int]]()
    pending = [(node, axis)]
    while pending:
        current, place = pending.pop()
        if (current, place) in seen:
            continue
        seen.add((current, place))
        found = _at_origin(module, shapes, current, place)
        if found is not None:
            return found
        pending += reversed(list(_before(module, shapes, current, place)))
    return None


def _at_origin(module: fx.GraphModule, shapes: Shapes, node: fx.Node, axis: int) -> bool | None:
    """Answer at an operation that says by itself where its channels are."""
    called = called_module(module, node)
    rank = shapes.rank(node)
    if called is not None:
        axes, is_linear = conv_axes(called), isinstance(called, nn.Linear)
    else:
        axes, _ = conv_function(node.target) or (None, False)
        is_linear = node.target in (F.linear, linear)
    if axes is not None:
        return axis == (1 if rank is None else rank - axes - 1)
    if is_norm(node, called) or isinstance(called, _CHANNELS_ON_AXIS_1):
        return axis == 1
    if is_linear:
        return None if rank is None else axis == rank - 1
    if node.target is operator.getitem and node.args[1] == 0:
        source = node.args[0]
        maker = called_module(module, source) if isinstance(source, fx.Node) else None
        if isinstance(maker, _CHANNELS_LAST):
            # Sequences of features, one sample or several.
            return axis == 2 if rank is None else axis == rank - 1
    return None


def _before(
    module: fx.GraphModule, shapes: Shapes, node: fx.Node, axis: int
) -> Iterator[tuple[fx.Node, int]]:
    """Yield operands, with the axis of each that holds the same entries."""
    moved = axis_before_view(shapes, node, axis)
    if moved is not None:
        source, place = moved
        if place is not None:
            yield source, place
        return
    rank = shapes.rank(node)
    if kind_of(module, node) in _THROUGH or _is_elementwise(module, node):
        for operand in node.all_input_nodes:
            if rank is not None and shapes.rank(operand) == rank:
                yield operand, axis


def _is_elementwise(module: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether a node applies one function to every element, or none."""
    called = called_module(module, node)
    if called is not None:
        return (
            isinstance(called, nn.Identity)
            or type(called).__module__ == nn.modules.activation.__name__
        )
    name = getattr(node.target, "__name__", str(node.target)).rstrip("_")
    return name in _ELEMENTWISE


_ELEMENTWISE = frozenset(
    {"relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "hardswish",
     "hardsigmoid", "hardtanh", "sigmoid", "tanh", "mish", "softplus", "softsign", "clamp",
     "clone", "to", "float", "half", "bfloat16"}
)  # fmt: skip
