"""Where a gauge's axis goes in operations that only move, cut or join values.

Views are exact for scale and shift alike: an entry keeps its channel. Where the output's axis
holds several of the input's, the vector is repeated or tiled; where it splits the channels, a
vector cannot follow.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from dropsurgery.graph.affine import Refused, argument
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.gauge import Gauge
from dropsurgery.graph.shapes import BATCH_META

# (shapes, node, its input, gauge, whether the gauge is the output's) → the other one's gauge.
Mapper = Callable[[Shapes, fx.Node, fx.Node, Gauge, bool], Gauge]

_TRACE = "trace with example inputs, for example ds.apply(model, ..., example_inputs=(x,))"


def lost(node: fx.Node, why: str) -> Refused:
    """Return the refusal of an operation in which the channels' axis is lost."""
    return Refused(f"'{node.name}' {why}")


def same(shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """Nothing moves."""
    return gauge


def _rank(shapes: Shapes, node: fx.Node) -> int:
    rank = shapes.rank(node)
    if rank is None:
        raise Refused(f"the rank of '{node.name}' is not known: {_TRACE}")
    return rank


def _dims(values: Any, rank: int, node: fx.Node) -> list[int]:
    dims = list(values) if isinstance(values, tuple | list) else [values]
    if not all(type(dim) is int and -rank <= dim < rank for dim in dims):
        raise lost(node, "has axes that are computed")
    return [dim % rank for dim in dims]


def permute(shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """output.shape[k] is input.shape[dims[k]]."""
    rest = node.args[1:] or (node.kwargs.get("dims"),)
    dims: Any = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    order = _dims(dims, len(dims), node)
    assert gauge.axis is not None
    return gauge.moved(order[gauge.axis] if back else order.index(gauge.axis))


def transpose(shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """Two axes change places."""
    first, second = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    if isinstance(first, int) and isinstance(second, int) and first >= 0 and second >= 0:
        dims = [first, second]
    else:
        dims = _dims((first, second), _rank(shapes, source), node)
    assert gauge.axis is not None
    return gauge.moved({dims[0]: dims[1], dims[1]: dims[0]}.get(gauge.axis, gauge.axis))


def turn(shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """The two axes of a matrix change places."""
    if _rank(shapes, source) != 2:
        raise lost(node, "turns a vector")
    assert gauge.axis is not None
    return gauge.moved(1 - gauge.axis)


def squeeze(shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """Axes of one entry go; without `dim`, those that the example inputs showed."""
    shape = shapes.shape(source)
    dim = argument(node, 1, "dim")
    if shape is None or dim is None or not isinstance(dim, int | tuple):
        raise lost(node, f"drops axes that are not known: {_TRACE}")
    dims = _dims(dim, len(shape), node)
    if any(shape[axis] is None for axis in dims):
        raise lost(node, f"drops axes that are not known: {_TRACE}")
    gone = {axis for axis in dims if shape[axis] == 1}
    return _kept(node, gauge, [axis for axis in range(len(shape)) if axis not in gone], back)


def unsqueeze(shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """An axis of one entry is put in."""
    rank = _rank(shapes, source)
    (new,) = _dims(argument(node, 1, "dim"), rank + 1, node)
    return _kept(node, gauge, [axis for axis in range(rank + 1) if axis != new], not back)


def _kept(node: fx.Node, gauge: Gauge, kept: Sequence[int], back: bool) -> Gauge:
    """Move a gauge between a value and one that has only its axes `kept`, in order."""
    assert gauge.axis is not None
    if back:
        return gauge.moved(kept[gauge.axis])
    if gauge.axis not in kept:
        raise lost(node, "drops the channels' axis")
    return gauge.moved(kept.index(gauge.axis))


def reduction(shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """A mean or sum over other axes than the channels'."""
    dim, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    if dim is None or not isinstance(keep, bool):
        raise lost(node, "reduces every axis")
    rank = _rank(shapes, source)
    gone = set(_dims(dim, rank, node))
    assert gauge.axis is not None
    if not gone or (keep and gauge.axis in gone):
        raise lost(node, "reduces the channels' axis")
    if keep:
        return gauge
    return _kept(node, gauge, [axis for axis in range(rank) if axis not in gone], back)


def expand(shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """Axes of one entry get more, and new ones come in front; `repeat` makes copies of it."""
    ranks = _rank(shapes, node), _rank(shapes, source)
    assert gauge.axis is not None
    axis = gauge.axis + (ranks[1] - ranks[0] if back else ranks[0] - ranks[1])
    sizes = shapes.shape(node), shapes.shape(source)
    if axis < 0 or sizes[0] is None or sizes[1] is None:
        raise lost(node, "has the channels on an axis that is new")
    own, given = (gauge.axis, axis) if back else (axis, gauge.axis)
    if not sizes[0][own] == sizes[1][given] == len(gauge.vector):
        raise lost(node, f"may repeat the channels: {_TRACE}")
    return gauge.moved(axis)


def flatten(shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """Neighbouring axes become one."""
    start, end = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
    return _flatten(shapes, node, source, gauge, back, start, end)


def flatten_module(layer: Any) -> Mapper:
    """Return the rule of `nn.Flatten`."""
    return lambda shapes, node, source, gauge, back: _flatten(
        shapes, node, source, gauge, back, layer.start_dim, layer.end_dim
    )


def _flatten(
    shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool, start: Any, end: Any
) -> Gauge:
    assert gauge.axis is not None
    if isinstance(start, int) and gauge.axis < start:
        return gauge
    start, end = _dims((start, end), _rank(shapes, source), node)
    moved = gauge.axis + (end - start if back else start - end)
    if (gauge.axis if back else moved) > start:
        return gauge.moved(moved)
    return reshape(shapes, node, source, gauge, back)


def reshape(shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """The entries stay in their order, and the shapes tell which axis holds the channels.

    With R entries behind an axis of C channels, an axis of n entries with S behind it holds the
    channels where S ≤ R and S·n ≥ R·C: each R/S times in a row, the whole S·n/(R·C) times.
    """
    if any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values())):
        raise lost(node, "reads the bits as another dtype")
    sizes = (shapes.shape(node), shapes.shape(source))
    here, there = sizes if back else sizes[::-1]
    assert gauge.axis is not None
    if here is None or there is None:
        raise lost(node, f"is a reshape of unknown rank: {_TRACE}")
    behind, count = here[gauge.axis + 1 :], len(gauge.vector)
    if None in behind or count < 2:
        raise lost(node, f"is a reshape of unknown sizes: {_TRACE}")
    inner = math.prod(size for size in behind if size is not None)
    for axis in range(len(there)):
        rest, size = there[axis + 1 :], there[axis]
        if size is None or None in rest:
            continue
        below = math.prod(s for s in rest if s is not None)
        if below > inner or below * size < inner * count:
            continue
        outer, loose = divmod(below * size, inner * count)
        if loose or inner % below or (outer > 1 and not back):
            break
        _check_batch(node, source, axis, gauge.axis, back, there[:axis])
        return gauge.repeated(inner // below, outer, axis)
    raise lost(node, "splits the channels' axis, or joins others to it")


def _check_batch(
    node: fx.Node, source: fx.Node, axis: int, known: int, back: bool, left: Sequence[int | None]
) -> None:
    """Raise Refused where the axis may hold the batch as well, which had one entry when traced."""
    pairs = ((source, axis if back else known), (node, known if back else axis))
    kinds = [(value.meta.get(BATCH_META, (None, None)), place) for value, place in pairs]
    if all(kind == "axis" and at != place for (kind, at), place in kinds):
        return
    if any(kind == "axis" and at == place for (kind, at), place in kinds):
        raise lost(node, "joins the channels' axis to the batch")
    if None in left or math.prod(size for size in left if size is not None) < 2:
        raise lost(node, f"may join the channels' axis to the batch: {_TRACE}")


def getitem(shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """Slices of other axes keep the channels; a slice of theirs takes some of the vector."""
    if source.target in SPLITS:
        return part_of(shapes, node, source, gauge, back)
    index = node.args[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    plain = all(p is None or p is Ellipsis or type(p) in (int, slice) for p in parts)
    if not plain:
        raise lost(node, "takes entries that are computed")
    rank = _rank(shapes, source)
    used = sum(part is not None and part is not Ellipsis for part in parts)
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    parts[at : at + 1] = [slice(None)] * (rank - used)
    inputs, kept, cut = iter(range(rank)), list[int | None](), dict[int, slice]()
    for part in parts:
        axis = None if part is None else next(inputs)
        if type(part) is not int:
            kept.append(axis)
        if isinstance(part, slice) and axis is not None:
            cut[axis] = part
    assert gauge.axis is not None
    own = kept[gauge.axis] if back else gauge.axis
    if own is None or own not in kept:
        raise lost(node, "drops the channels' axis")
    shape = shapes.shape(source)
    total = len(gauge.vector) if not back else None if shape is None else shape[own]
    if cut[own] == slice(None):
        return gauge.moved(own if back else kept.index(own))
    if total is None or any(isinstance(end, fx.Node) for end in (cut[own].start, cut[own].stop)):
        raise lost(node, f"takes channels that are not known: {_TRACE}")
    start, stop, step = cut[own].indices(total)
    if step != 1:
        raise lost(node, "takes every other channel")
    if back:
        return gauge.placed(start, total, own)
    return gauge.sliced(start, stop, kept.index(own))


def split(shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """The parts of a tuple together have the gauge of what was split; see `part_of`."""
    if node.target in _UNBINDS and _split_dim(shapes, node, source) == gauge.axis:
        raise lost(node, "takes the channels apart")
    return gauge


def _split_dim(shapes: Shapes, node: fx.Node, source: fx.Node) -> int:
    position = 1 if node.target in _UNBINDS else 2
    dim = argument(node, position, "dim", 0)
    return dim if type(dim) is int and dim >= 0 else _dims(dim, _rank(shapes, source), node)[0]


def part_of(shapes: Shapes, node: fx.Node, parts: fx.Node, gauge: Gauge, back: bool) -> Gauge:
    """One part of a tuple: all channels, or those from the sizes of the parts before it."""
    source = argument(parts, 0, "tensor", parts.kwargs.get("input"))
    assert gauge.axis is not None
    dim, index = _split_dim(shapes, parts, source), node.args[1]
    if parts.target in _UNBINDS:
        axis = gauge.axis
        return gauge.moved(axis + (axis >= dim) if back else axis - (axis > dim))
    if dim != gauge.axis:
        return gauge
    shape = shapes.shape(source)
    total = len(gauge.vector) if not back else None if shape is None else shape[dim]
    sizes = None if total is None else _part_sizes(parts, total)
    if total is None or sizes is None or type(index) is not int:
        raise lost(parts, f"has parts of unknown sizes: {_TRACE}")
    index %= len(sizes)
    start = sum(sizes[:index])
    if back:
        return gauge.placed(start, total, dim)
    return gauge.sliced(start, start + sizes[index])


def _part_sizes(parts: fx.Node, total: int) -> list[int] | None:
    sizes = argument(parts, 1, "chunks" if parts.target in _CHUNKS else "split_size_or_sections")
    sizes = parts.kwargs.get("split_size", sizes)
    if isinstance(sizes, tuple | list):
        return list(sizes) if all(type(size) is int for size in sizes) else None
    if type(sizes) is not int or sizes < 1:
        return None
    size = -(-total // sizes) if parts.target in _CHUNKS else sizes
    return [min(size, total - start) for start in range(0, total, size)]


_CHUNKS = frozenset({"chunk", torch.chunk})
_UNBINDS = frozenset({"unbind", torch.unbind})
SPLITS: frozenset[Any] = frozenset({"split", torch.split}) | _CHUNKS | _UNBINDS


def pixel_shuffle(
    shapes: Shapes, node: fx.Node, source: fx.Node, gauge: Gauge, back: bool
) -> Gauge:
    """An output channel is made of r² neighbouring input channels."""
    factor = argument(node, 1, "upscale_factor")
    return shuffled(node, gauge, factor, back, shapes.rank(source))


def shuffled(node: fx.Node, gauge: Gauge, factor: Any, back: bool, rank: int | None) -> Gauge:
    """Repeat a vector r² times, from the side of the fewer channels to the other one."""
    if not back or not isinstance(factor, int) or rank is None or gauge.axis != rank - 3:
        raise lost(node, "shuffles the channels")
    return gauge.repeated(factor**2, 1, gauge.axis)


def shuffle_module(layer: nn.PixelShuffle) -> Mapper:
    """Return the rule of `nn.PixelShuffle`."""
    return lambda shapes, node, source, gauge, back: shuffled(
        node, gauge, layer.upscale_factor, back, shapes.rank(source)
    )


def unshuffled(shapes: Shapes, node: fx.Node, gauge: Gauge, factor: Any, back: bool) -> Gauge:
    """Pixel unshuffle is pixel shuffle the other way."""
    return shuffled(node, gauge, factor, not back, shapes.rank(node))


def unshuffle_module(layer: nn.PixelUnshuffle) -> Mapper:
    """Return the rule of `nn.PixelUnshuffle`."""
    return lambda shapes, node, source, gauge, back: unshuffled(
        shapes, node, gauge, layer.downscale_factor, back
    )


VIEWS: Mapping[Any, Mapper] = {
    **dict.fromkeys(("permute", torch.permute), permute),
    **dict.fromkeys(("transpose", "swapaxes", torch.transpose, torch.swapaxes), transpose),
    **dict.fromkeys(("t", torch.t), turn),
    **dict.fromkeys(("squeeze", torch.squeeze), squeeze),
    **dict.fromkeys(("unsqueeze", torch.unsqueeze), unsqueeze),
    **dict.fromkeys(("flatten", torch.flatten), flatten),
    **dict.fromkeys(
        ("view", "reshape", torch.reshape, "view_as", "reshape_as", "unflatten"), reshape
    ),
    **dict.fromkeys(("expand", "expand_as", "repeat", "broadcast_to", torch.broadcast_to), expand),
    **dict.fromkeys(("contiguous", "clone", "detach"), same),
    **dict.fromkeys(SPLITS, split),
    operator.getitem: getitem,
    torch.nn.functional.pixel_shuffle: pixel_shuffle,
    torch.nn.functional.pixel_unshuffle: lambda shapes, node, source, gauge, back: unshuffled(
        shapes, node, gauge, argument(node, 1, "downscale_factor"), back
    ),
}
