"""Operations that lay a tensor out anew: views, permutations, new axes, repetition."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from dropsurgery.graph.batch.along import reduced
from dropsurgery.graph.batch.calls import Call, Found
from dropsurgery.graph.batch.sizes import BATCH_SIZE, ONE, Size, product
from dropsurgery.graph.batch.values import (
    Place,
    Rank,
    State,
    Value,
    extended,
    from_sizes,
    laid_out,
    of_rank,
    over_axes,
    permuted,
    tensor,
    unknown_rank,
)


def same(call: Call) -> Found:
    """The rule of `same`."""
    return call.unknown() if call.input is None else call.input


def permute(call: Call) -> Found:
    """The rule of `permute`."""
    value, order = call.input, call.dims(1, "dims")
    if value is None or order is None:
        return call.unknown()
    value = of_rank(call.algebra, value, len(order))
    axes = [axis % len(order) for axis in order]
    if len(value.sizes) != len(order) or sorted(axes) != list(range(len(order))):
        return call.unknown()
    return permuted(call.name, value, axes)


def transpose(call: Call) -> Found:
    """The rule of `transpose`."""
    value = call.input
    names = ("dim0", "axis0"), ("dim1", "axis1")
    dims = [
        call.argument(index, first, call.node.kwargs.get(second))
        for index, (first, second) in enumerate(names, start=1)
    ]
    return call.unknown() if value is None else transposed(call, value, dims)


def transposed(call: Call, value: Value, dims: Sequence[Any]) -> Value:
    """Return a value with two axes exchanged."""
    first, second = (value.axis(dim) for dim in dims)
    if first is None or second is None:
        state = over_axes(value, dims)
        if value.place is None or state is not None:
            batch = value.batch if value.place is None else State.UNKNOWN
            return (
                Value(call.name, (), Rank(value.rank.offset, value.rank.of), batch)
                if not value.whole
                else unknown_rank(call.name, batch)
            )
        return replace(value, name=call.name, sizes=value.sizes[: value.place.axis + 1])
    value = extended(call.algebra, value, max(first, second) + 1)
    if max(first, second) >= len(value.sizes):
        return call.unknown()
    order = list(range(len(value.sizes)))
    order[first], order[second] = order[second], order[first]
    return permuted(call.name, value, order)


def t(call: Call) -> Found:
    """The rule of `t`."""
    value = call.input
    if value is None or not value.whole or len(value.sizes) > 2:
        return call.unknown()
    return permuted(call.name, value, range(len(value.sizes))[::-1])


def movedim(call: Call) -> Found:
    """The rule of `movedim`."""
    value = call.input
    ends = [call.argument(1, "source"), call.argument(2, "destination")]
    dims = [list(end) if isinstance(end, tuple | list) else [end] for end in ends]
    if value is None or not all(type(dim) is int for end in dims for dim in end):
        return call.unknown()
    if not value.whole:
        if min(min(end) for end in dims) < 0:
            return call.unknown()
        value = extended(call.algebra, value, max(max(end) for end in dims) + 1)
    count = max(len(value.sizes), 1)  # a scalar takes axis 0 too
    source, target = ([dim % count for dim in end] for end in dims)
    if not value.sizes:
        return replace(value, name=call.name)
    order = [axis for axis in range(count) if axis not in source]
    for axis, place in sorted(zip(source, target, strict=True), key=operator.itemgetter(1)):
        order.insert(place, axis)
    return permuted(call.name, value, order)


def reshape(call: Call) -> Found:
    """The rule of `reshape`."""
    value, sizes = call.input, call.sizes(1, "shape", "size")
    if value is None or sizes is None:
        return call.unknown()
    return laid_out(call.name, value, sizes, call.algebra)


def reshape_as(call: Call) -> Found:
    """`x.view_as(y)`."""
    value, other = call.input, call.tensor(1, "other")
    if value is None or other is None or not other.whole:
        return call.unknown()
    return laid_out(call.name, value, list(other.sizes), call.algebra)


def expand_as(call: Call) -> Found:
    """`x.expand_as(y)`."""
    value, other = call.input, call.tensor(1, "other")
    if value is None or other is None or not other.whole:
        return call.unknown()
    return expanded(call, value, list(other.sizes))


def flattened(call: Call, value: Value, start: Any, end: Any) -> Found:
    """Return a value whose axes from `start` to `end` are one."""
    if type(start) is not int or type(end) is not int:
        return call.unknown()
    first, last = value.axis(start), value.axis(end)
    if first is None or last is None:
        place = value.place
        if first is not None and end == -1 and place is not None and first > place.axis:
            return tensor(
                call.name,
                (*extended(call.algebra, value, first).sizes[:first], call.new_size(first)),
                place,
            )
        return call.unknown()
    value = extended(call.algebra, value, last + 1)
    if last >= len(value.sizes) or first > last:
        return call.unknown()
    target = [
        *value.sizes[:first],
        product(value.sizes[first : last + 1]),
        *value.sizes[last + 1 :],
    ]
    return _relaid(call, value, target)


def _relaid(call: Call, value: Value, target: Sequence[Size]) -> Value:
    """Reshape the known leading axes; those behind them stay."""
    whole = replace(value, rank=Rank(len(value.sizes)))
    found = laid_out(call.name, whole, target, call.algebra)
    return replace(found, rank=value.rank + (len(target) - len(value.sizes)))


def flatten(call: Call) -> Found:
    """The rule of `flatten`."""
    value = call.input
    ends = call.argument(1, "start_dim", 0), call.argument(2, "end_dim", -1)
    return call.unknown() if value is None else flattened(call, value, *ends)


def unflattened(call: Call, value: Value, dim: Any, sizes: list[Size | None] | None) -> Found:
    """Return a value one of whose axes is several."""
    axis = value.axis(dim)
    behind = value.hits(dim) is False and value.batch is not State.BLENDED
    if axis is None and sizes is not None and behind:
        keep = 0 if value.place is None else value.place.axis + 1
        rank = value.rank + (len(sizes) - 1)
        return Value(call.name, value.sizes[:keep], rank, value.batch)
    if axis is None or sizes is None:
        return call.unknown()
    value = extended(call.algebra, value, axis + 1)
    if axis >= len(value.sizes):
        return call.unknown()
    given = product(size for size in sizes if size is not None)
    rest = value.sizes[axis].over(given)
    if rest is None:
        varies = call.algebra.varies(value.sizes[axis])
        rest = call.algebra.opaque("rest", call.name, varies=varies)
        if varies:
            return call.unknown()
    inner = [rest if size is None else size for size in sizes]
    return _relaid(call, value, [*value.sizes[:axis], *inner, *value.sizes[axis + 1 :]])


def unflatten(call: Call) -> Found:
    """The rule of `unflatten`."""
    value, sizes = call.input, call.argument(2, "sizes")
    if value is None or not isinstance(sizes, tuple | list | fx.Node):
        return call.unknown()
    given = call.as_sizes([sizes] if isinstance(sizes, fx.Node) else list(sizes))
    return unflattened(call, value, call.argument(1, "dim"), given)


def inserted(call: Call, value: Value, axis: int, size: Size = ONE) -> Value:
    """Return a value with a new axis."""
    value = extended(call.algebra, value, axis)
    place, batch = value.place, value.batch
    if place is not None and axis <= place.axis:
        batch = replace(place, axis=place.axis + 1)
    sizes = (*value.sizes[:axis], size, *value.sizes[axis:])
    return Value(call.name, sizes, value.rank + 1, batch)


def unsqueeze(call: Call) -> Found:
    """The rule of `unsqueeze`."""
    value, dim = call.input, call.argument(1, "dim")
    if value is None or type(dim) is not int:
        return call.unknown()
    if dim < 0:
        if not value.whole:
            behind = value.place is None or len(value.sizes) + 1 + dim > value.place.axis
            keep = 0 if value.place is None else value.place.axis + 1
            if not behind:
                return call.unknown()
            return Value(call.name, value.sizes[:keep], value.rank + 1, value.batch)
        dim += len(value.sizes) + 1
    return inserted(call, value, dim)


def squeeze(call: Call) -> Found:
    """The rule of `squeeze`."""
    value, dims = call.input, call.dims(1, "dim")
    if value is None:
        return call.unknown()
    given = len(call.node.args) > 1 or bool(call.node.kwargs)
    axes = value.axes(dims) if dims else list(range(len(value.sizes)))
    missing = dims is not None and len(axes) < len(dims)
    if (given and dims is None) or missing or (not given and not value.whole):
        return call.unknown()
    place = value.place
    value = extended(call.algebra, value, max(axes, default=0) + 1)
    unclear = [a for a in axes if value.sizes[a].symbols and (place is None or a != place.axis)]
    gone = [a for a in axes if value.sizes[a] == ONE]
    if unclear:
        if place is None or min(unclear) < place.axis:
            return unknown_rank(call.name, value.batch if place is None else State.UNKNOWN)
        head = reduced(call, replace(value, sizes=value.sizes[: place.axis + 1]),
                       [a for a in gone if a < place.axis], keep=False)  # fmt: skip
        return replace(head, rank=Rank(0, call.name))
    return reduced(call, value, gone, keep=False)


def expanded(call: Call, value: Value, sizes: list[Size | None]) -> Found:
    """The rule of `expanded`."""
    if not value.whole or len(sizes) < len(value.sizes):
        if value.whole:
            return call.unknown()
        value = of_rank(call.algebra, value, len(sizes)) if value.place is None else value
        if not value.whole:
            return call.unknown()
    shift = len(sizes) - len(value.sizes)
    old = [ONE] * shift + list(value.sizes)
    new = [a if size is None else size for a, size in zip(old, sizes, strict=True)]
    if value.place is None:
        if value.batch is not State.NONE:
            return tensor(call.name, new, State.UNKNOWN)
        return from_sizes(call.name, new, call.algebra)
    place = replace(value.place, axis=value.place.axis + shift)
    again = [
        axis
        for axis, (a, size) in enumerate(zip(old, new, strict=True))
        if axis != place.axis and a == ONE and call.algebra.varies(size)
    ]
    if again:
        return tensor(call.name, new, State.BLENDED if BATCH_SIZE in new else State.UNKNOWN)
    new[place.axis] = place.size
    return tensor(call.name, new, place)


def expand(call: Call) -> Found:
    """The rule of `expand`."""
    value, sizes = call.input, call.sizes(1, "sizes", "size")
    return call.unknown() if value is None or sizes is None else expanded(call, value, sizes)


def repeat(call: Call) -> Found:
    """The rule of `repeat`."""
    value, counts = call.input, call.sizes(1, "repeats", "dims")
    if value is None or counts is None or None in counts:
        return call.unknown()
    value = of_rank(call.algebra, value, len(counts)) if value.place is None else value
    if not value.whole or len(counts) < len(value.sizes):
        return call.unknown()
    shift = len(counts) - len(value.sizes)
    old = [ONE] * shift + list(value.sizes)
    pairs = list(zip(old, counts, strict=True))
    sizes = [size * count for size, count in pairs if count is not None]
    varying = [axis for axis, (_, n) in enumerate(pairs) if n is None or call.algebra.varies(n)]
    place = value.place
    if place is None:
        if not varying or value.batch is not State.NONE:
            return tensor(call.name, sizes, State.UNKNOWN if varying else value.batch)
        axis = varying[0]
        inside = sizes[axis].over(BATCH_SIZE)
        if len(varying) > 1 or counts[axis] != BATCH_SIZE or inside is None:
            return call.unknown()
        return tensor(call.name, sizes, Place(axis, ONE, inside))
    axis = place.axis + shift
    count = counts[axis]
    if varying or count is None:
        return call.unknown()
    return tensor(call.name, sizes, Place(axis, place.outer * count, place.inner))


def repeat_interleave(call: Call) -> Found:
    """The rule of `repeat_interleave`."""
    value, count = call.input, call.find(call.argument(1, "repeats"))
    axis = None if value is None else value.axis(call.argument(2, "dim"))
    if value is None or axis is None or not isinstance(count, Size):
        return call.unknown()
    value = extended(call.algebra, value, axis + 1)
    sizes = list(value.sizes)
    if axis >= len(sizes) or call.algebra.varies(count):
        return call.unknown()
    sizes[axis] = sizes[axis] * count
    place, batch = value.place, value.batch
    if place is not None and place.axis == axis:
        batch = replace(place, inner=place.inner * count)
    return Value(call.name, tuple(sizes), value.rank, batch)
