"""What an operation makes of a gauge: one small rule each.

A rule gets the gauges that are known on a node's inputs and output, and returns the ways in which
the others can be chosen so that the operation computes the same as before, each with what is
deposited in the operation's own weights. With z = f(u):

- views, identities, `split`: z has the entries of u, and so its gauge;
- ReLU, LeakyReLU, PReLU, max pooling: f(s·u) = s·f(u) for s ≥ 0; the maximum also passes u + d;
- averages: f(s·u) = s·f(u), and f(u + d) = f(u) + d where the weights of every window sum to 1
  (no zeros of the padding among them, no divisor of its own); sums pass the scale alone;
- z = u ± w: s·z = s·u ± s·w, so that all three have one scale; shifts: d(z) = d(u) ± d(w);
- z = u·w: s·z = (s·u)·w = u·(s·w); matrix products in the columns of the second factor and the
  rows of the first; attention in the columns of its values, as a mean of them;
- a stored tensor that is added, multiplied or joined becomes another one: s·w + t;
- concatenation: the vectors stand side by side as the operands do;
- padding: zeros pass the scale; reflection, replication and wrapping pass the shift, too;
- interpolation: weights that sum to 1 pass both;
- a layer W·u + b: takes a gauge of z into W and b, one of u into W and, where no zeros are padded,
  into b; a LayerNorm, GroupNorm or InstanceNorm takes a gauge of z into its weight and bias;
- another affine map of channels takes either, as far as it multiplies and adds by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from dropsurgery.graph.affine import Refused, argument, identity_input
from dropsurgery.graph.gauge import Gauge, joined, total
from dropsurgery.graph.leaves import forward_owner, has_hooks
from dropsurgery.graph.shape_rules import windowed
from dropsurgery.graph.transfer_views import (
    VIEWS,
    Mapper,
    flatten_module,
    lost,
    reduction,
    same,
    shuffle_module,
    unshuffle_module,
)

if TYPE_CHECKING:
    from dropsurgery.graph.transfer import Scene

Known = Mapping[fx.Node, Gauge]


@dataclass(frozen=True)
class Option:
    """One way to settle an operation.

    Attributes:
        gauges: what its other inputs and its output have to become.
        deposits: what its own weights take, by port: "in", "out" or "through".
    """

    gauges: tuple[tuple[fx.Node, Gauge], ...] = ()
    deposits: tuple[tuple[str, Gauge], ...] = ()


Rule = Callable[["Scene", fx.Node, Known], list[Option]]


def unary(
    mapper: Mapper, source: fx.Node, scene: Scene, node: fx.Node, known: Known
) -> list[Option]:
    """Settle an operation with one operand: the operand's gauge decides, else the output's."""
    if not set(known) <= {source, node}:
        raise lost(node, "reads it as something else than its operand")
    ways = [False] * (source in known) + [True] * (node in known)
    for index, back in enumerate(ways):
        gauge = known[node if back else source]
        try:
            if gauge.axis is not None:
                gauge = mapper(scene.shapes, node, source, gauge, back)
        except Refused:
            # Pixel shuffle and some reshapes hand a vector on in one direction only.
            if index + 1 == len(ways):
                raise
            continue
        return [Option(((source if back else node, gauge),))]
    return [Option()]


def _only_scale(node: fx.Node, known: Known, why: str) -> None:
    if any(gauge.part == "shift" for gauge in known.values()):
        raise lost(node, why)


def _not_negative(node: fx.Node, known: Known) -> None:
    for gauge in known.values():
        if gauge.part == "scale" and not bool((gauge.vector >= 0).all()):
            raise lost(node, "does not pass a scale that is negative for some channels")


def homogeneous(scene: Scene, node: fx.Node, known: Known) -> list[Option]:
    """ReLU and its kin: f(s·u) = s·f(u) for s ≥ 0."""
    _only_scale(node, known, "is a nonlinearity, which no shift passes")
    _not_negative(node, known)
    return unary(same, _data(node), scene, node, known)


def _data(node: fx.Node) -> fx.Node:
    data = argument(node, 0, "input", node.kwargs.get("x"))
    if not isinstance(data, fx.Node):
        raise lost(node, "has no operand")
    return data


def _prelu(scene: Scene, node: fx.Node, known: Known) -> list[Option]:
    """PReLU has slopes of its own, which no gauge changes."""
    if node.op == "call_function" and node.args[1:] and node.args[1] in known:
        raise lost(node, "reads the value as its slope")
    return homogeneous(scene, node, known)


def _window(axes: int) -> Mapper:
    def mapper(shapes: Any, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
        rank = shapes.rank(source)
        assert gauge.axis is not None
        if rank is None:
            shape = windowed(None, axes)
            rank = len(shape) if shape is not None else 0
        if gauge.axis >= rank - axes:
            raise lost(node, "pools over the channels' axis")
        return gauge

    return mapper


def _max_pool(axes: int) -> Rule:
    def rule(scene: Scene, node: fx.Node, known: Known) -> list[Option]:
        layer: Any = scene.called(node)
        pair = layer.return_indices if layer is not None else node.kwargs.get("return_indices")
        if pair or len(node.args) > 6:
            raise lost(node, "returns indices")
        _not_negative(node, known)
        return unary(_window(axes), _data(node), scene, node, known)

    return rule


def _avg_pool(axes: int) -> Rule:
    def rule(scene: Scene, node: fx.Node, known: Known) -> list[Option]:
        layer: Any = scene.called(node)
        if layer is not None:
            padding, counts = layer.padding, layer.count_include_pad
            divisor = getattr(layer, "divisor_override", None)
        else:
            padding = argument(node, 3, "padding", 0)
            counts = argument(node, 5, "count_include_pad", True)
            divisor = argument(node, 6, "divisor_override", None)
        sizes = padding if isinstance(padding, tuple | list) else [padding]
        if divisor is not None or (counts is not False and any(size != 0 for size in sizes)):
            _only_scale(node, known, "averages over the zeros of its padding")
        return unary(_window(axes), _data(node), scene, node, known)

    return rule


def _spatial(axes: int) -> Rule:
    return lambda scene, node, known: unary(_window(axes), _data(node), scene, node, known)


def _reduction(keeps_shift: bool) -> Rule:
    def rule(scene: Scene, node: fx.Node, known: Known) -> list[Option]:
        if not keeps_shift:
            _only_scale(node, known, "is a sum, which multiplies a shift")
        if node.kwargs.keys() - {"dim", "keepdim", "input"} or len(node.args) > 3:
            raise lost(node, "casts")
        return unary(reduction, _data(node), scene, node, known)

    return rule


def _upsample(scene: Scene, node: fx.Node, known: Known) -> list[Option]:
    source = _data(node)
    rank = scene.shapes.rank(source)
    for gauge in known.values():
        if gauge.axis is not None and (rank is None or gauge.axis != 1 or rank < 3):
            raise lost(node, "interpolates, and its rank is not known")
    return unary(same, source, scene, node, known)


def _padding(scene: Scene, node: fx.Node, known: Known) -> list[Option]:
    """F.pad and the padding layers; the last axes come first in the list of widths."""
    layer: Any = scene.called(node)
    source = _data(node)
    if layer is None:
        widths, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
        value = argument(node, 3, "value", None) or 0.0
    else:
        widths, value = layer.padding, getattr(layer, "value", 0.0)
        mode = "constant" if isinstance(layer, nn.modules.padding._ConstantPadNd) else "other"
    if not isinstance(widths, tuple | list) or not all(type(w) is int for w in widths):
        raise lost(node, "pads by widths that are computed")
    if mode == "constant":
        _only_scale(node, known, "pads with zeros")
        if value != 0:
            raise lost(node, "pads with a number that is not zero")
    return unary(_padded(tuple(widths)), source, scene, node, known)


def _padded(widths: tuple[int, ...]) -> Mapper:
    def mapper(shapes: Any, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
        rank = shapes.rank(source)
        if rank is None:
            raise lost(node, "pads a value of unknown rank: trace with example inputs")
        place = 2 * (rank - 1 - (gauge.axis or 0))
        if any(widths[place : place + 2]):
            raise lost(node, "pads the channels' axis")
        return gauge

    return mapper


def concatenation(scene: Scene, node: fx.Node, known: Known) -> list[Option]:
    """Operands side by side: along the channels each has its part of the vector."""
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    plain = set(node.kwargs) <= {"tensors", "dim"} and type(dim) is int
    if not isinstance(tensors, tuple | list) or not plain:
        raise lost(node, "joins values that are computed")
    if len(set(tensors)) < len(tensors):
        raise lost(node, "joins a value to itself")
    shapes = [scene.shapes.shape(tensor) for tensor in tensors]
    rank = next((len(shape) for shape in shapes if shape is not None), None)
    axis = next((gauge.axis for gauge in known.values() if gauge.axis is not None), None)
    if rank is None or any(shape is None or len(shape) != rank for shape in shapes):
        raise lost(node, "joins values of unknown ranks: trace with example inputs")
    if axis != dim % rank and all(gauge.axis != dim % rank for gauge in known.values()):
        tied = [gauge for gauge in known.values() if gauge.axis is not None] or [*known.values()]
        return [Option(tuple((wire, tied[0]) for wire in (*tensors, node)))]
    axis = dim % rank
    sizes = [shape[axis] for shape in shapes if shape is not None]
    if any(size is None for size in sizes):
        raise lost(node, "joins values of unknown sizes: trace with example inputs")
    counts = [size for size in sizes if size is not None]
    if node not in known:
        found = joined([known.get(t) for t in tensors], counts, axis, _part(known))
        return [Option(((node, found),))]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    gauge = known[node]
    slices = [gauge.sliced(at, at + size) for at, size in zip(starts, counts, strict=True)]
    return [Option(tuple(zip(tensors, slices, strict=True)))]


def _part(known: Known) -> Any:
    return next(iter(known.values())).part


def product(
    scene: Scene, node: fx.Node, left: fx.Node, right: fx.Node, known: Known
) -> list[Option]:
    """z = u·w: the scale of z is that of u or of w, or both together."""
    _only_scale(node, known, "is a product, which no shift passes")
    if left is right or (left in known and right in known):
        raise lost(node, "multiplies values that all change")
    if len(known) == 1 and node in known:
        gauge = known[node]
        found = [(operand, scene.of_operand(operand, node, gauge)) for operand in (left, right)]
        return [Option(((operand, own),)) for operand, own in found if own is not None]
    wire = left if left in known else right
    of_result = scene.of_result(wire, node, known[wire])
    if of_result is None:
        raise lost(node, "broadcasts the channels' axis")
    return [Option(((node, of_result),))]


def addition(
    scene: Scene, node: fx.Node, left: fx.Node, right: fx.Node, sign: int, known: Known
) -> list[Option]:
    """z = u ± w: one scale for all three; the shift of one is made up for by another."""
    if left is right:
        raise lost(node, "adds a value to itself")
    wires = (node, left, right)
    placed: dict[fx.Node, Gauge] = {}
    for wire in wires:
        if wire in known:
            found = scene.of_result(wire, node, known[wire])
            if found is None:
                raise lost(node, "broadcasts the channels' axis")
            placed[wire] = found
    gauge = next(iter(placed.values()))
    if gauge.part == "scale":
        scaled = [(wire, scene.of_operand(wire, node, gauge)) for wire in wires]
        if any(own is None for _, own in scaled):
            raise lost(node, "broadcasts the channels' axis")
        return [Option(tuple((wire, own) for wire, own in scaled if own is not None))]
    signs = {node: -1, left: 1, right: sign}  # u ± w - z = 0
    free = [wire for wire in wires if wire not in placed]
    if not free:
        rest = total(list(placed.values()), [signs[wire] for wire in placed])
        if not rest.is_identity():
            raise lost(node, "would be shifted in several ways")
        return [Option()]
    options = []
    for wire in sorted(free, key=lambda wire: scene.distance(wire, node)):
        shift = total(list(placed.values()), [-signs[w] * signs[wire] for w in placed])
        if len(placed) == 1:  # a shorter path for the same vector
            ((other, gauge),) = placed.items()
            same_sign = -signs[other] * signs[wire] == 1
            shift = (
                gauge if same_sign else gauge.then("minus", axis=gauge.axis, vector=-gauge.vector)
            )
        own = scene.of_operand(wire, node, shift)
        if own is not None:
            options.append(Option(((wire, own),)))
    return options


def matmul(scene: Scene, node: fx.Node, known: Known) -> list[Option]:
    """Columns of the second factor, (u·(w·s)) = (u·w)·s, and rows of the first."""
    left, right = argument(node, 0, "input"), argument(node, 1, "other", node.kwargs.get("mat2"))
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        raise lost(node, "is a product of a value and itself")
    _only_scale(node, known, "is a product, which no shift passes")
    if left in known and right in known:
        raise lost(node, "multiplies values that all change")
    gauge = next(known[wire] for wire in (left, right, node) if wire in known)
    if gauge.axis is None:
        wires = [wire for wire in (left, right) if wire in known] or [right, left]
        return [Option(((node, gauge), (wire, gauge))) for wire in wires]
    ranks = {wire: scene.shapes.rank(wire) or 0 for wire in (left, right, node)}
    if min(ranks.values()) < 2:
        raise lost(node, "is a product of vectors, or of values of unknown rank")
    wire = next(w for w in (left, right, node) if w in known)
    end = gauge.axis - ranks[wire]
    if (wire, end) not in ((left, -2), (right, -1), (node, -2), (node, -1)):
        raise lost(node, "is a product that sums over the channels")
    factor = left if end == -2 else right
    own = gauge.moved(ranks[factor] + end)
    return [Option(((node, gauge.moved(ranks[node] + end)), (factor, own)))]


def embedding(scene: Scene, node: fx.Node, known: Known) -> list[Option]:
    """F.embedding: the result's last axis is the table's."""
    table = argument(node, 1, "weight")
    if argument(node, 3, "max_norm") is not None or not isinstance(table, fx.Node):
        raise lost(node, "changes the rows of its table as they are read")
    if not set(known) <= {table, node}:
        raise lost(node, "reads it as indices")
    wire = table if table in known else node
    gauge, rank = known[wire], scene.shapes.rank(node)
    if gauge.axis is None:
        return [Option(((table, gauge), (node, gauge)))]
    if rank is None:
        raise lost(node, "is of unknown rank: trace with example inputs")
    if gauge.axis != (1 if wire is table else rank - 1):
        raise lost(node, "looks rows up, and another axis than theirs is mapped")
    return [Option(((table, gauge.moved(1)), (node, gauge.moved(rank - 1))))]


def attention(scene: Scene, node: fx.Node, known: Known) -> list[Option]:
    """softmax(…)·v: columns of v are those of the result; rows that sum to 1 pass a shift, too.

    A row that a mask closes altogether is zero, and dropout makes other sums.
    """
    value = argument(node, 2, "value")
    if not isinstance(value, fx.Node) or not set(known) <= {node, value}:
        raise lost(node, "reads it as query, key or mask")
    if value in (argument(node, 0, "query"), argument(node, 1, "key")):
        raise lost(node, "reads it as query or key, too")
    mask, dropout = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    if mask is not None or dropout != 0.0:
        _only_scale(node, known, "has a mask or dropout, and rows that do not sum to 1")
    wire = value if value in known else node
    gauge, ranks = known[wire], (scene.shapes.rank(value), scene.shapes.rank(node))
    if gauge.axis is None:
        return [Option(((node, gauge), (value, gauge)))]
    if None in ranks or ranks[0] != ranks[1] or gauge.axis + 1 != ranks[0]:
        raise lost(node, "attends over other axes than the values' last")
    return [Option(((node, gauge), (value, gauge)))]


_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU)
_HOMOGENEOUS_FORWARDS = frozenset(f"torch.nn.modules.activation.{c.__name__}" for c in _HOMOGENEOUS)


def is_homogeneous(module: nn.Module) -> bool:
    """Say whether a module's f(s·u) is s·f(u) for s ≥ 0: ReLU, LeakyReLU, the identity."""
    known = forward_owner(module) in _HOMOGENEOUS_FORWARDS | {"torch.nn.modules.linear.Identity"}
    return known and not has_hooks(module)


_FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys(
        (F.relu, torch.relu, torch.relu_, F.relu_, F.leaky_relu, F.leaky_relu_, "relu", "relu_"),
        homogeneous,
    ),
    **dict.fromkeys((F.prelu, torch.prelu), _prelu),
    **dict.fromkeys((torch.mean, "mean"), _reduction(True)),
    **dict.fromkeys((torch.sum, "sum"), _reduction(False)),
    **dict.fromkeys((torch.cat, torch.concat), concatenation),
    **dict.fromkeys((torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"), matmul),
    F.embedding: embedding,
    F.scaled_dot_product_attention: attention,
    F.interpolate: _upsample,
    F.pad: _padding,
}
_MODULES: dict[str, Rule] = {
    **dict.fromkeys(_HOMOGENEOUS_FORWARDS, homogeneous),
    "torch.nn.modules.activation.PReLU": _prelu,
    "torch.nn.modules.upsampling.Upsample": _upsample,
    **{
        f"torch.nn.modules.padding.{kind}": _padding
        for kind in ("_ConstantPadNd", "_ReflectionPadNd", "_ReplicationPadNd", "_CircularPadNd",
                     "CircularPad1d", "CircularPad2d", "CircularPad3d")
    },
}  # fmt: skip
for _axes in (1, 2, 3):
    for _name, _rule in (("max_pool", _max_pool), ("avg_pool", _avg_pool),
                         ("adaptive_avg_pool", _spatial)):  # fmt: skip
        _class = "".join(word.capitalize() for word in _name.split("_"))
        _MODULES[f"torch.nn.modules.pooling.{_class}{_axes}d"] = _rule(_axes)
        _FUNCTIONS[getattr(F, f"{_name}{_axes}d")] = _rule(_axes)
        if hasattr(torch, f"{_name}{_axes}d"):
            _FUNCTIONS[getattr(torch, f"{_name}{_axes}d")] = _rule(_axes)
_VIEW_MODULES: Mapping[str, Callable[[Any], Mapper]] = {
    "torch.nn.modules.flatten.Flatten": flatten_module,
    "torch.nn.modules.pixelshuffle.PixelShuffle": shuffle_module,
    "torch.nn.modules.pixelshuffle.PixelUnshuffle": unshuffle_module,
}


def find_rule(scene: Scene, node: fx.Node) -> Rule | None:
    """Return the rule of an operation without weights; None where there is none."""
    called = scene.called(node)
    source = identity_input(node, called)
    if source is not None:
        return lambda scene, node, known: unary(same, source, scene, node, known)
    if called is None:
        mapper = VIEWS.get(node.target) if node.op.startswith("call_") else None
        if mapper is not None:
            found = mapper
            return lambda scene, node, known: unary(found, _source(node), scene, node, known)
        return _FUNCTIONS.get(node.target) if node.op.startswith("call_") else None
    if has_hooks(called):
        return None
    owner = forward_owner(called)
    if owner in _VIEW_MODULES:
        view = _VIEW_MODULES[owner](called)
        return lambda scene, node, known: unary(view, _data(node), scene, node, known)
    return _MODULES.get(owner)


def _source(node: fx.Node) -> fx.Node:
    """Return what a view is a view of; other nodes may give it sizes."""
    data = argument(node, 0, "input", node.kwargs.get("tensor"))
    if not isinstance(data, fx.Node):
        raise Refused(f"'{node.name}' has no operand")
    return data
