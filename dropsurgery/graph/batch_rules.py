"""What functions and methods do to the axis of the batch: one small rule per operation.

A rule returns what is known of the call's output. An operation that is not here is one about which
nothing is known, and so is a call whose arguments a rule does not understand.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dropsurgery.graph.batch_calls import Call, Found, Parts, Shape
from dropsurgery.graph.batch_values import (
    Place,
    Rank,
    State,
    Value,
    broadcast,
    extended,
    from_sizes,
    of_rank,
    over_axes,
    permuted,
    reshape,
    size_of,
    tensor,
    unknown_rank,
)
from dropsurgery.graph.sizes import BATCH_SIZE, ONE, Size, product

Rule = Callable[[Call], Found]


# --- along axes ----------------------------------------------------------------------------------


def along(call: Call, value: Value, dims: Iterable[object], *, resize: bool = False) -> Value:
    """Return a value whose entries are mixed or moved along some axes; `resize`: and counted anew.

    The rank stays.
    """
    dims = list(dims)
    state = over_axes(value, dims)
    if state is not None:
        return (
            Value(call.name, (), value.rank if value.whole else Rank(0, call.name), state)
            if not value.whole
            else tensor(call.name, value.sizes, state)
        )
    value = replace(value, name=call.name)
    if not resize:
        return value
    new = call.new_axes()
    axes = {value.axis(dim) for dim in dims}
    if None in axes:  # behind the batch, and no more is known
        keep = 0 if value.place is None else value.place.axis + 1
        return replace(value, sizes=value.sizes[:keep])
    return replace(
        value, sizes=tuple(next(new) if a in axes else s for a, s in enumerate(value.sizes))
    )


def _along(index: int, default: Any = None, *, resize: bool = False) -> Rule:
    """The rule of an operation along the axes that an argument names."""

    def rule(call: Call) -> Found:
        value, dims = call.input, call.argument(index, "dim", default)
        if value is None or dims is None:
            return call.unknown()
        return along(call, value, dims if isinstance(dims, tuple | list) else (dims,),
                     resize=resize)  # fmt: skip

    return rule


def trailing(call: Call, value: Value | None, axes: int, last: Sequence[Size | None] = (),
             *, batched: bool = False) -> Value:  # fmt: skip
    """Return the output of an operation over the last `axes` axes.

    Args:
        call: the call.
        value: its input.
        axes: over how many axes it goes.
        last: their new sizes; None for one that is not known. Left out, none is.
        batched: an input of unknown rank has one axis before them.
    """
    if value is None:
        return call.unknown()
    if batched:
        value = of_rank(call.algebra, value, axes + 1)
    new = call.new_axes()
    sizes = [next(new) if size is None else size for size in last] or [
        next(new) for _ in range(axes)
    ]
    if not value.whole:
        if value.place is not None and value.place.axis >= len(value.sizes) - axes:
            return unknown_rank(call.name, State.UNKNOWN)
        keep = value.sizes[: max(0, len(value.sizes) - axes)]
        return replace(value, name=call.name, sizes=keep)
    count = len(value.sizes) - axes
    if value.place is not None and value.place.axis >= count:
        return unknown_rank(call.name, State.UNKNOWN)
    return replace(value, name=call.name, sizes=(*value.sizes[:count], *sizes))


def windowed(call: Call, value: Value | None, axes: int, channels: Size | None,
             spatial: Sequence[Size | None]) -> Value:  # fmt: skip
    """Return the output of a convolution or pooling: (N, C, …), or (C, …) of rank axes + 1."""
    if value is not None:
        value = of_rank(call.algebra, value, axes + 2)
        if channels is None and len(value.sizes) > axes:
            channels = value.sizes[-axes - 1]
    return trailing(call, value, axes + 1, (channels, *spatial))


def last_axis(call: Call, value: Value | None, size: Size | None) -> Value:
    """Return the output of a linear layer. Its width is fixed, so that it is not the batch's."""
    if value is None or value.whole or value.place is None:
        return trailing(call, value, 1, (size,))
    return replace(value, name=call.name, sizes=value.sizes[: value.place.axis + 1])


def _reduction(call: Call) -> Found:
    value = call.input
    if value is None:
        return call.unknown()
    dims = call.argument(1, "dim", call.node.kwargs.get("axis"))
    keep = call.argument(2, "keepdim", False) is True
    if isinstance(dims, fx.Node):
        return call.unknown()  # max(x, y), or axes that are computed
    if dims is None or dims == ():
        blank = value.batch if value.place is None else State.REDUCED
        return tensor(call.name, (), blank)
    return reduced(call, value, dims if isinstance(dims, tuple | list) else (dims,), keep=keep)


def reduced(call: Call, value: Value, dims: Sequence[Any], *, keep: bool) -> Value:
    """Return a value reduced over some axes."""
    hits = [value.hits(dim) for dim in dims]
    if None in hits or value.batch is State.UNKNOWN:
        return unknown_rank(call.name, State.UNKNOWN)
    axes = [value.axis(dim) for dim in dims]
    batch: Place | State = State.REDUCED if any(hits) else value.batch
    if None in axes:
        place = value.place
        head = () if place is None else value.sizes[: place.axis + 1]
        return unknown_rank(call.name, batch, head)
    value = extended(call.algebra, value, max(axes, default=0) + 1)  # type: ignore[type-var, operator]
    if keep:
        sizes = tuple(ONE if axis in axes else size for axis, size in enumerate(value.sizes))
        return Value(call.name, sizes, value.rank, batch)
    sizes = tuple(size for axis, size in enumerate(value.sizes) if axis not in axes)
    if isinstance(batch, Place):
        batch = replace(batch, axis=batch.axis - sum(a < batch.axis for a in axes))  # type: ignore[misc]
    return Value(call.name, sizes, value.rank + -len(set(axes)), batch)


def _variance(call: Call) -> Found:
    return (
        _reduction(call)
        if set(call.node.kwargs) <= {"dim", "keepdim", "unbiased"} and len(call.node.args) < 3
        else call.unknown()
    )


def _pair_reduction(call: Call) -> Found:
    """max, min and their kin: over all, element by element, or a pair (values, indices)."""
    other = call.argument(1, "dim", call.node.kwargs.get("other"))
    if isinstance(other, fx.Node):
        return call.elementwise() if isinstance(call.find(other), Value) else call.unknown()
    found = _reduction(call)
    return Parts(each=found) if other is not None and isinstance(found, Value) else found


def _pair_along(call: Call) -> Found:
    found = _along(1, -1, resize=True)(call)
    return Parts(each=found) if isinstance(found, Value) else found


def _topk(call: Call) -> Found:
    found = _along(2, -1, resize=True)(call)
    return Parts(each=found) if isinstance(found, Value) else found


# --- views ---------------------------------------------------------------------------------------


def _same(call: Call) -> Found:
    return call.unknown() if call.input is None else replace(call.input, name=call.name)


def _permute(call: Call) -> Found:
    value, order = call.input, call.dims(1, "dims")
    if value is None or order is None:
        return call.unknown()
    value = of_rank(call.algebra, value, len(order))
    axes = [axis % len(order) for axis in order]
    if len(value.sizes) != len(order) or sorted(axes) != list(range(len(order))):
        return call.unknown()
    return permuted(call.name, value, axes)


def _transpose(call: Call) -> Found:
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


def _t(call: Call) -> Found:
    value = call.input
    if value is None or not value.whole or len(value.sizes) > 2:
        return call.unknown()
    return permuted(call.name, value, range(len(value.sizes))[::-1])


def _movedim(call: Call) -> Found:
    value = call.input
    ends = [call.argument(1, "source"), call.argument(2, "destination")]
    dims = [list(end) if isinstance(end, tuple | list) else [end] for end in ends]
    if value is None or not all(type(dim) is int for end in dims for dim in end):
        return call.unknown()
    if not value.whole:
        if min(min(end) for end in dims) < 0:
            return call.unknown()
        value = extended(call.algebra, value, max(max(end) for end in dims) + 1)
    count = len(value.sizes)
    source, target = ([dim % count for dim in end] for end in dims)
    order = [axis for axis in range(count) if axis not in source]
    for axis, place in sorted(zip(source, target, strict=True), key=operator.itemgetter(1)):
        order.insert(place, axis)
    return permuted(call.name, value, order)


def _reshape(call: Call) -> Found:
    value, sizes = call.input, call.sizes(1, "shape", "size")
    if value is None or sizes is None:
        return call.unknown()
    return reshape(call.name, value, sizes, call.algebra)


def _like_other(rule: Callable[[Call, Value, list[Size | None]], Found]) -> Rule:
    def as_other(call: Call) -> Found:
        value, other = call.input, call.tensor(1, "other")
        if value is None or other is None or not other.whole:
            return call.unknown()
        return rule(call, value, list(other.sizes))

    return as_other


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
                (*extended(call.algebra, value, first).sizes[:first], next(call.new_axes())),
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
    found = reshape(call.name, whole, target, call.algebra)
    return replace(found, rank=value.rank + (len(target) - len(value.sizes)))


def _flatten(call: Call) -> Found:
    value = call.input
    ends = call.argument(1, "start_dim", 0), call.argument(2, "end_dim", -1)
    return call.unknown() if value is None else flattened(call, value, *ends)


def unflattened(call: Call, value: Value, dim: Any, sizes: list[Size | None] | None) -> Found:
    """Return a value one of whose axes is several."""
    axis = value.axis(dim)
    if axis is None and sizes is not None and value.hits(dim) is False:
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


def _unflatten(call: Call) -> Found:
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


def _unsqueeze(call: Call) -> Found:
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


def _squeeze(call: Call) -> Found:
    value, dims = call.input, call.dims(1, "dim")
    if value is None:
        return call.unknown()
    given = len(call.node.args) > 1 or bool(call.node.kwargs)
    axes = [value.axis(dim) for dim in dims] if dims else list(range(len(value.sizes)))
    if (given and dims is None) or None in axes or (not given and not value.whole):
        return call.unknown()
    place = value.place
    value = extended(call.algebra, value, max(axes, default=0) + 1)  # type: ignore[type-var, operator]
    unclear = [a for a in axes if value.sizes[a].symbols and (place is None or a != place.axis)]  # type: ignore[index]
    gone = [a for a in axes if value.sizes[a] == ONE]  # type: ignore[index]
    if unclear:
        if place is None or min(unclear) < place.axis:  # type: ignore[type-var, operator]
            return unknown_rank(call.name, value.batch if place is None else State.UNKNOWN)
        head = reduced(call, replace(value, sizes=value.sizes[: place.axis + 1]),
                       [a for a in gone if a < place.axis], keep=False)  # fmt: skip
        return replace(head, rank=Rank(0, call.name))
    return reduced(call, value, gone, keep=False)


def _expanded(call: Call, value: Value, sizes: list[Size | None]) -> Found:
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
        spread = [size if a == ONE or a == size else a for a, size in zip(old, new, strict=True)]
        return from_sizes(call.name, spread, call.algebra)
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


def _expand(call: Call) -> Found:
    value, sizes = call.input, call.sizes(1, "sizes", "size")
    return call.unknown() if value is None or sizes is None else _expanded(call, value, sizes)


def _repeat(call: Call) -> Found:
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


def _repeat_interleave(call: Call) -> Found:
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


# --- parts and their opposite --------------------------------------------------------------------


def _split(call: Call) -> Found:
    value, dim = call.input, call.argument(2, "dim", 0)
    if value is None:
        return call.unknown()
    return Parts(each=along(call, value, (dim,), resize=True))


def _unbind(call: Call) -> Found:
    value, dim = call.input, call.argument(1, "dim", 0)
    if value is None:
        return call.unknown()
    part = reduced(call, value, (dim,), keep=False)
    blended = part.batch is State.REDUCED and value.place is not None
    return Parts(each=replace(part, batch=State.BLENDED) if blended else part)


def _cat(call: Call) -> Found:
    values = call.list_of(call.argument(0, "tensors"))
    dim = call.argument(1, "dim", call.node.kwargs.get("axis", 0))
    if not values:
        return call.unknown()
    return joined(call, values, dim)


def joined(call: Call, values: Sequence[Value], dim: Any) -> Value:
    """Return values side by side along an axis."""
    first = next((value for value in values if value.whole), values[0])
    placed = [value for value in values if value.place is not None]
    if any(value.batch is State.UNKNOWN for value in values):
        return unknown_rank(call.name, State.UNKNOWN)
    if len(placed) > 0:
        # All have one rank, and the same sizes but along `dim`.
        hits = [over_axes(value, (dim,)) for value in placed]
        if State.UNKNOWN in hits and first.axis(dim) is None:
            return unknown_rank(call.name, State.UNKNOWN)
    axis = first.axis(dim)
    places = {value.place for value in placed}
    batch: Place | State = State.NONE
    if any(value.batch is State.BLENDED for value in values):
        batch = State.BLENDED
    elif len(places) == 1:
        place = placed[0].place
        assert place is not None
        batch = State.BLENDED if axis == place.axis else place
        if batch is State.BLENDED and len(values) == 1:
            batch = place
    elif places:
        batch = State.UNKNOWN
    elif any(value.batch is State.REDUCED for value in values):
        batch = State.REDUCED
    if not first.whole:
        keep = batch.axis + 1 if isinstance(batch, Place) else 0
        return Value(call.name, placed[0].sizes[:keep] if placed else (), first.rank, batch)
    new = call.new_axes()
    sizes = [next(new) if a == axis else size for a, size in enumerate(first.sizes)]
    if isinstance(batch, Place):
        sizes[batch.axis] = batch.size
    return Value(call.name, tuple(sizes), first.rank, batch)


def _stack(call: Call) -> Found:
    values, dim = call.list_of(call.argument(0, "tensors")), call.argument(1, "dim", 0)
    if not values or type(dim) is not int:
        return call.unknown()
    common = broadcast(call.name, values, call.algebra)
    if dim < 0:
        if not common.whole:
            return call.unknown()
        dim += len(common.sizes) + 1
    return inserted(call, common, dim, next(call.new_axes()))


def _getitem(call: Call) -> Found:
    found, index = call.find(call.argument(0, "input")), call.argument(1, "index")
    if isinstance(found, Parts):
        if type(index) is int:
            return found[index] if isinstance(found[index], Value | Parts) else call.unknown()
        return (
            found
            if found.each is not None
            else Parts(found.items[index])
            if isinstance(index, slice)
            else call.unknown()
        )
    if isinstance(found, Shape):
        return _size_at(call, found, index)
    if not isinstance(found, Value):
        return call.unknown()
    return indexed(call, found, list(index) if isinstance(index, tuple) else [index])


def _size_at(call: Call, shape: Shape, index: Any) -> Found:
    owner = call.known.get(shape.of) if shape.of is not None else None
    if not isinstance(owner, Value):
        if type(index) is int and -len(shape.sizes) <= index < len(shape.sizes):
            return shape.sizes[index]
        literal = isinstance(index, slice) and not any(
            isinstance(end, fx.Node) for end in (index.start, index.stop, index.step)
        )
        return Shape(shape.sizes[index]) if literal else None
    if type(index) is int and index >= 0:
        assert shape.of is not None
        call.known[shape.of] = extended(call.algebra, owner, index + 1)
        return size_of(call.algebra, owner, index)
    if type(index) is int:
        return _size_from_the_end(call, owner, index)
    if isinstance(index, slice) and index.step is None:
        start, stop = index.start or 0, index.stop
        if type(start) is int and start < 0 and stop is None:
            return Shape(tuple(_size_from_the_end(call, owner, i) for i in range(start, 0)))
        if type(start) is int and type(stop) is int and 0 <= start < stop:
            return Shape(tuple(size_of(call.algebra, owner, i) for i in range(start, stop)))
    return None


def _size_from_the_end(call: Call, owner: Value, index: int) -> Size:
    varies = owner.hits(index) is not False or owner.batch in (State.UNKNOWN, State.BLENDED)
    return call.algebra.opaque("axis", owner.name, index, varies=varies)


def indexed(call: Call, value: Value, parts: list[Any]) -> Value:
    """Return `value[parts]`."""
    used = sum(part is not None and part is not Ellipsis for part in parts)
    if Ellipsis in [part for part in parts if not isinstance(part, fx.Node)]:
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        after = sum(part is not None for part in parts[place + 1 :])
        if not value.whole:
            return _indexed_behind(call, value, parts[:place], parts[place + 1 :])
        fill = [slice(None)] * (len(value.sizes) - used)
        if len(value.sizes) < used:
            return call.unknown()
        del after
        parts = [*parts[:place], *fill, *parts[place + 1 :]]
    value = extended(call.algebra, value, used)
    if used > len(value.sizes):
        return call.unknown()
    return _take(call, value, parts)


def _indexed_behind(call: Call, value: Value, before: list[Any], after: list[Any]) -> Value:
    """Index a value of unknown rank from its end: what is behind the batch does not matter."""
    place = value.place
    plain = all(isinstance(p, int | slice) and not isinstance(p, bool) for p in after)
    if before or place is None or not plain or len(value.sizes) - len(after) <= place.axis:
        return call.unknown()
    fewer = sum(isinstance(p, int) for p in after)
    return Value(call.name, value.sizes[: place.axis + 1], value.rank + -fewer, place)


def _take(call: Call, value: Value, parts: Sequence[Any]) -> Value:
    """Index the leading axes of a value."""
    old, sizes, batch = 0, list[Size](), value.batch
    new = call.new_axes()
    place = value.place
    for number, part in enumerate(parts):
        on_batch = place is not None and old == place.axis and part is not None
        if part is None:
            sizes.append(ONE)
            continue
        if isinstance(part, slice):
            full = part == slice(None) or _is_full(call, part, value.sizes[old])
            if on_batch and not full:
                ends = (part.start, part.stop, part.step)
                literal = not any(isinstance(end, fx.Node) for end in ends)
                batch = State.BLENDED if literal else State.UNKNOWN
            if on_batch and full and place is not None:
                batch = replace(place, axis=len(sizes))
            sizes.append(value.sizes[old] if full else next(new))
        elif type(part) is int or isinstance(call.find(part), Size):
            batch = State.BLENDED if on_batch else batch
        else:
            return _advanced(call, value, parts[number:], old, sizes, batch)
        old += 1
    if place is not None and place.axis >= old:
        batch = replace(place, axis=place.axis - old + len(sizes))
    rank = value.rank + (len(sizes) - old)
    return Value(call.name, (*sizes, *value.sizes[old:]), rank, batch)


def _is_full(call: Call, part: slice, size: Size) -> bool:
    """Say whether a slice that is bounded by a computed size takes the whole axis."""
    whole = part.start in (None, 0) and part.step in (None, 1)
    return whole and isinstance(part.stop, fx.Node) and call.find(part.stop) == size


def _advanced(
    call: Call, value: Value, parts: Sequence[Any], old: int, sizes: list[Size],
    batch: Place | State,
) -> Value:  # fmt: skip
    """Index with a tensor, from the axis that it stands at."""
    index = call.find(parts[0])
    still = isinstance(index, Value) and index.batch is State.NONE
    place = value.place
    if not still or len(parts) > 1:
        return call.unknown()
    if place is not None and place.axis < old:
        return Value(call.name, tuple(sizes), Rank(0, call.name), batch)
    return unknown_rank(call.name, value.batch if place is None else State.UNKNOWN)


# --- sizes and new tensors -----------------------------------------------------------------------


def _shape(call: Call) -> Found:
    value, dim = call.input, call.argument(1, "dim")
    if value is None:
        return None
    node = call.argument(0, "input")
    shape = Shape(value.sizes, None if value.whole else node)
    return shape if dim is None else _size_at(call, shape, dim)


def _attribute(call: Call) -> Found:
    name = call.argument(1, "name")
    if name == "shape":
        value = call.input
        return (
            None
            if value is None
            else Shape(value.sizes, None if value.whole else call.argument(0, "input"))
        )
    if name == "T":
        value = call.input
        if value is None or not value.whole:
            return call.unknown()
        return permuted(call.name, value, range(len(value.sizes))[::-1])
    if name in ("mT", "mH"):
        return call.unknown() if call.input is None else transposed(call, call.input, (-2, -1))
    return _same(call) if name in ("data", "real", "imag") else None


def _numel(call: Call) -> Found:
    value = call.input
    return product(value.sizes) if value is not None and value.whole else None


def _length(call: Call) -> Found:
    found = call.find(call.argument(0, "input"))
    if isinstance(found, Value) and found.sizes:
        return found.sizes[0]
    return Size(len(found.sizes)) if isinstance(found, Shape) and found.of is None else None


def _new(*names: str, index: int = 0) -> Rule:
    def rule(call: Call) -> Found:
        sizes = call.sizes(index, *names)
        if sizes is None or None in sizes:
            return call.unknown()
        return from_sizes(call.name, [s for s in sizes if s is not None], call.algebra)

    return rule


def _arange(call: Call) -> Found:
    ends = [call.find(value) for value in call.node.args]
    if len(ends) == 1 and isinstance(ends[0], Size):
        return from_sizes(call.name, ends, call.algebra)  # type: ignore[arg-type]
    found = call.unknown()
    return tensor(call.name, (next(call.new_axes()),), found.batch)


def _meshgrid(call: Call) -> Found:
    return Parts(each=call.unknown())


# --- products ------------------------------------------------------------------------------------


def _matmul(call: Call) -> Found:
    left, right = call.input, call.tensor(1, "other" if "other" in call.node.kwargs else "mat2")
    if left is None or right is None:
        return call.unknown()
    return multiplied(call, left, right)


def multiplied(call: Call, left: Value, right: Value) -> Value:
    """Return the matrix product of two values of two or more axes."""
    values = (left, right)
    if any(v.batch is State.UNKNOWN for v in values):
        return unknown_rank(call.name, State.UNKNOWN)
    if not all(value.whole for value in values):
        return _multiplied_behind(call, left, right)
    if min(len(left.sizes), len(right.sizes)) < 2:
        return call.unknown()
    # The sum runs over the last axis of the left and the last but one of the right.
    summed = [left.hits(-1), right.hits(-2)]
    if any(summed):
        blended = any(
            value.place is not None for value in values if not summed[values.index(value)]
        )
        single = State.REDUCED if all(summed) or not blended else State.UNKNOWN
        sizes = [size_of(call.algebra, v, 0) for v in ()]
        del sizes
        return unknown_rank(call.name, single)
    rows = _with_axis(left, -1, ONE)
    columns = _with_axis(right, -2, ONE)
    return broadcast(call.name, (rows, columns), call.algebra)


def _with_axis(value: Value, axis: int, size: Size) -> Value:
    sizes = list(value.sizes)
    sizes[axis] = size
    return replace(value, sizes=tuple(sizes))


def _multiplied_behind(call: Call, left: Value, right: Value) -> Value:
    """Multiply where a rank is not known: leading axes of like values stay where they are."""
    if any(value.hits(dim) is not False for value in (left, right) for dim in (-1, -2)):
        return unknown_rank(call.name, State.UNKNOWN)
    heads = [
        replace(value, sizes=value.sizes if value.place is None else
                value.sizes[: value.place.axis + 1])
        for value in (left, right)
    ]  # fmt: skip
    found = broadcast(call.name, heads, call.algebra)
    place = found.place
    return replace(found, sizes=() if place is None else found.sizes[: place.axis + 1])


def _linear(call: Call) -> Found:
    weight = call.tensor(1, "weight")
    if weight is None or weight.batch is not State.NONE:
        return call.unknown()
    return last_axis(call, call.input, weight.sizes[0] if len(weight.sizes) == 2 else None)


def _conv(axes: int) -> Rule:
    def rule(call: Call) -> Found:
        weight = call.tensor(1, "weight")
        if weight is None or weight.batch is not State.NONE:
            return call.unknown()
        return windowed(call, call.input, axes, next(call.new_axes()), [None] * axes)

    return rule


def _pool(axes: int) -> Rule:
    def rule(call: Call) -> Found:
        found = windowed(call, call.input, axes, None, [None] * axes)
        return Parts(each=found) if call.node.kwargs.get("return_indices") is True else found

    return rule


def _einsum(call: Call) -> Found:
    equation, *operands = call.node.args
    values = call.list_of(operands[0] if len(operands) == 1 and not isinstance(
        operands[0], fx.Node) else operands)  # fmt: skip
    if not isinstance(equation, str) or "." in equation or not values:
        return call.unknown()
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(values):
        return call.unknown()
    sizes: dict[str, Size] = {}
    where: set[tuple[str, Size, Size]] = set()
    for term, value in zip(terms, values, strict=True):
        value = of_rank(call.algebra, value, len(term))
        if len(term) != len(value.sizes) or len(set(term)) != len(term):
            return call.unknown()
        for letter, size in zip(term, value.sizes, strict=True):
            if letter not in sizes or sizes[letter] == ONE or value.place is not None:
                sizes[letter] = size
        if value.place is not None:
            where.add((term[value.place.axis], value.place.outer, value.place.inner))
        elif value.batch is not State.NONE:
            return call.unknown()
    axes = [sizes[letter] for letter in right]
    letters = {letter for letter, *_ in where}
    if not where:
        return tensor(call.name, axes, State.NONE)
    if len(where) == 1 and letters <= set(right):
        letter, outer, inner = where.pop()
        place = Place(right.index(letter), outer, inner)
        axes[place.axis] = place.size
        return tensor(call.name, axes, place)
    if len(letters) > 1:
        return tensor(call.name, axes, State.BLENDED if letters & set(right) else State.REDUCED)
    return unknown_rank(call.name, State.UNKNOWN if letters <= set(right) else State.REDUCED)


def attention(call: Call) -> Found:
    """Attention of (N, …, L, E) over (N, …, S, E) and (N, …, S, Ev)."""
    names = ("query", "key", "value")
    query, key, value = (call.tensor(index, name) for index, name in enumerate(names))
    if query is None or key is None or value is None:
        return call.unknown()
    states = [over_axes(one, (-2, -1)) for one in (key, value)]
    if over_axes(query, (-2, -1)) is not None or any(state is not None for state in states):
        return unknown_rank(call.name, State.UNKNOWN)
    if not all(one.whole for one in (query, key, value)):
        return _multiplied_behind(call, query, value)
    weights = _with_axis(query, -1, ONE)
    heads = [_with_axis(_with_axis(one, -2, ONE), -1, ONE) for one in (key,)]
    return broadcast(call.name, (weights, *heads, _with_axis(value, -2, ONE)), call.algebra)


# --- others --------------------------------------------------------------------------------------


def _roll(call: Call) -> Found:
    value, dims = call.input, call.argument(2, "dims")
    if value is None or dims is None:
        return (
            call.unknown()
            if value is None or value.place is None
            else replace(value, name=call.name, batch=State.BLENDED)
        )
    return along(call, value, dims if isinstance(dims, tuple | list) else (dims,))


def _flip(call: Call) -> Found:
    value, dims = call.input, call.dims(1, "dims")
    return call.unknown() if value is None or dims is None else along(call, value, dims)


def _pad(call: Call) -> Found:
    value, widths = call.input, call.argument(1, "pad")
    if value is None or not isinstance(widths, tuple | list):
        return call.unknown()
    return padded(call, value, widths)


def padded(call: Call, value: Value, widths: Sequence[Any]) -> Value:
    """Return a value with margins (left, right) on its last axes, the last one first."""
    axes = len(widths) // 2
    sizes: list[Size | None] = []
    for axis in range(axes):
        old = value.sizes[axis - axes] if value.whole and axes <= len(value.sizes) else None
        margins = [call.find(width) for width in widths[2 * (axes - axis) - 2 : 2 * (axes - axis)]]
        for margin in margins:
            known = old is not None and isinstance(margin, Size)
            old = call.algebra.arithmetic("add", old, margin) if known else None  # type: ignore[arg-type]
        sizes.append(old)
    still = [axis for axis in range(-axes, 0) if widths[-2 * axis - 2 : -2 * axis] != (0, 0)]
    if value.whole and value.place is not None and over_axes(value, still) is None:
        kept = value.sizes[: len(value.sizes) - axes]
        return replace(
            value,
            name=call.name,
            sizes=(
                *kept,
                *(
                    next(new) if s is None else s
                    for new, s in zip([call.new_axes()] * axes, sizes, strict=True)
                ),
            ),
        )
    return trailing(call, value, axes, sizes)


def _resize(call: Call) -> Found:
    value = call.input
    if value is None or (value.place is not None and value.place.axis > 1):
        return call.unknown()
    return replace(value, name=call.name, sizes=value.sizes[:2] if not value.whole else (
        *value.sizes[:2], *(s for s, _ in zip(call.new_axes(), value.sizes[2:], strict=False))
    ))  # fmt: skip


def embedded(call: Call, indices: Value | None, width: Size | None) -> Value:
    """Return rows of a table, one for each index: a new last axis."""
    if indices is None:
        return call.unknown()
    if not indices.whole:
        return Value(call.name, indices.sizes, indices.rank + 1, indices.batch)
    return inserted(
        call, indices, len(indices.sizes), next(call.new_axes()) if width is None else width
    )


def _embedding(call: Call) -> Found:
    weight = call.tensor(1, "weight")
    if weight is None or weight.batch is not State.NONE:
        return call.unknown()
    return embedded(call, call.input, weight.sizes[1] if len(weight.sizes) == 2 else None)


def _one_hot(call: Call) -> Found:
    return embedded(call, call.input, None)


def _gather(call: Call) -> Found:
    value, dim, index = call.input, call.argument(1, "dim"), call.tensor(2, "index")
    if value is None or index is None:
        return call.unknown()
    both = [one for one in (value, index) if one.place is not None]
    same = len({one.place for one in both}) == 1 and len(both) == 2
    if same and over_axes(index, (dim,)) is None:
        return replace(index, name=call.name)
    return call.unknown()


def _index_select(call: Call) -> Found:
    value, index = call.input, call.tensor(2, "index")
    if value is None or index is None or index.batch is not State.NONE:
        return call.unknown()
    return along(call, value, (call.argument(1, "dim"),), resize=True)


def _narrow(call: Call) -> Found:
    value = call.input
    return (
        call.unknown()
        if value is None
        else along(call, value, (call.argument(1, "dim"),), resize=True)
    )


def _select(call: Call) -> Found:
    found = _unbind(call)
    return found.each if isinstance(found, Parts) else found


def _layer_norm(call: Call) -> Found:
    shape = call.argument(1, "normalized_shape")
    if call.input is None or not isinstance(shape, tuple | list):
        return call.unknown()
    return normalised(call, call.input, len(shape))


def normalised(call: Call, value: Value, axes: int) -> Value:
    """Return a value normalised over its last axes, whose sizes are fixed: none is the batch."""
    if value.whole:
        return along(call, value, range(-axes, 0))
    return replace(value, name=call.name)


def _fft(call: Call) -> Found:
    """Transforms over two axes, the last two unless `dim` says which."""
    value, dims = call.input, call.argument(2, "dim", (-2, -1))
    if value is None or not isinstance(dims, tuple | list):
        return call.unknown()
    return along(call, value, dims, resize=True)


def _size_arithmetic(name: str) -> Rule:
    def rule(call: Call) -> Found:
        operands = (call.argument(0, "input"), call.argument(1, "other"))
        left, right = (call.find(value) for value in operands)
        if isinstance(left, Size) and isinstance(right, Size):
            return call.algebra.arithmetic(name, left, right)
        if isinstance(left, Shape) or isinstance(right, Shape):
            return _joined_sizes(call) if name == "add" else None
        tensors = any(isinstance(value, Value | Parts) for value in (left, right))
        return call.elementwise() if tensors else _python(call)

    return rule


def _joined_sizes(call: Call) -> Found:
    sizes: list[Size] = []
    for part in call.node.args:
        found = call.find(part)
        more: Any = found.sizes if isinstance(found, Shape) and found.of is None else None
        if isinstance(part, tuple | list):
            more = call.as_sizes(list(part))
        if more is None or None in more:
            return None
        sizes += more
    return Shape(tuple(sizes))


def _python(call: Call) -> Found:
    """A number that Python computes from sizes: a new size, the same for the same expression."""
    found = [call.find(value) for value in call.node.args]
    if not found or not all(isinstance(value, Size) for value in found):
        return None if all(not isinstance(v, Value) for v in found) else call.unknown()
    if len(found) == 1 and call.node.target in (
        builtins.int,
        builtins.round,
        math.floor,
        math.ceil,
    ):
        return found[0]
    return call.algebra.opaque(getattr(call.node.target, "__name__", ""), *found)


# --- the tables ----------------------------------------------------------------------------------

_UNARY = """
    abs alpha_dropout bernoulli bfloat16 celu clone contiguous cos detach double dropout dropout1d
    dropout2d dropout3d elu erf exp expm1 feature_alpha_dropout float gelu group_norm half
    hardsigmoid hardswish hardtanh instance_norm leaky_relu log log1p logical_not logsigmoid
    long int int mish neg nan_to_num positive reciprocal relu relu_ relu6 requires_grad_ round rsqrt
    selu sigmoid sigmoid_ sign silu sin softplus softsign sqrt square tanh tanh_ to type type_as
    zeros_like ones_like full_like empty_like rand_like randn_like batch_norm bool cpu cuda isnan
    local_response_norm floor ceil threshold invert bitwise_not erfinv atan exp_ masked_fill_
"""
_BINARY = """
    add_ addcdiv addcmul and_ atan2 clamp clamp_ clamp_max clamp_min div_ divide eq fmod ge gt iadd
    imul isub itruediv le lerp logical_and logical_or lt masked_fill maximum minimum mul_ multiply
    ne or_ prelu remainder sub_ subtract true_divide where xor logaddexp clip
"""
_REDUCTIONS = "all amax amin any count_nonzero mean nanmean prod sum logsumexp argmax argmin"
_NUMBERS = "ceil floor sqrt log2 log pow max min round int abs float"

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), _same),
    **dict.fromkeys(_BINARY.split(), lambda call: call.elementwise()),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(("var", "std"), _variance),
    **dict.fromkeys(("max", "min", "median"), _pair_reduction),
    **dict.fromkeys(("sort", "cummax", "cummin"), _pair_along),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum", "cumprod", "argsort"), _along(1)),
    **dict.fromkeys(("view", "reshape"), _reshape),
    **dict.fromkeys(("view_as", "reshape_as"),
                    _like_other(lambda c, v, sizes: reshape(c.name, v, sizes, c.algebra))),
    "expand_as": _like_other(_expanded),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes"), _split),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    **dict.fromkeys(("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "div"), None),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty"), _new("size", index=1)),
    "new_full": lambda c: call_sizes(c, c.argument(1, "size")),
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn"), _new("size")),
    **dict.fromkeys(("rfft2", "irfft2", "fft2", "ifft2"), _fft),
    **{f"conv{axes}d": _conv(axes) for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": _conv(axes) for axes in (1, 2, 3)},
    **{
        f"{kind}_pool{axes}d": _pool(axes)
        for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp")
        for axes in (1, 2, 3)
    },
    "permute": _permute, "t": _t, "flatten": _flatten, "unflatten": _unflatten,
    "unsqueeze": _unsqueeze, "squeeze": _squeeze, "expand": _expand,
    "repeat_interleave": _repeat_interleave, "unbind": _unbind, "select": _select,
    "stack": _stack, "getitem": _getitem, "size": _shape, "numel": _numel, "len": _length,
    "normalize": _along(2, 1), "glu": _along(1, -1, resize=True), "topk": _topk,
    "roll": _roll, "flip": _flip, "pad": _pad, "interpolate": _resize, "narrow": _narrow,
    "pixel_shuffle": lambda call: trailing(call, call.input, 3),
    "pixel_unshuffle": lambda call: trailing(call, call.input, 3),
    "linear": _linear, "einsum": _einsum, "scaled_dot_product_attention": attention,
    "embedding": _embedding, "one_hot": _one_hot, "gather": _gather,
    "index_select": _index_select, "layer_norm": _layer_norm, "rms_norm": _layer_norm,
    "arange": _arange, "meshgrid": _meshgrid,
}  # fmt: skip


def call_sizes(call: Call, sizes: Any) -> Found:
    """Return a new tensor of the sizes that one argument lists."""
    items = list(sizes) if isinstance(sizes, tuple | list) else [sizes]
    found = call.as_sizes(items)
    if found is None or None in found:
        return call.unknown()
    return from_sizes(call.name, [s for s in found if s is not None], call.algebra)


for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "div"):
    _RULES[_name] = _size_arithmetic("truediv" if _name == "div" else _name)

_SPACES = (torch, F, torch.fft, operator)
_FUNCTIONS: Mapping[Any, Rule] = {
    **{
        getattr(space, name): rule
        for name, rule in _RULES.items()
        for space in _SPACES
        if hasattr(space, name)
    },
    builtins.getattr: _attribute,
    builtins.len: _length,
    **{
        getattr(space, name): _python
        for name in _NUMBERS.split()
        for space in (builtins, math)
        if hasattr(space, name)
    },
}
_METHODS: Mapping[str, Rule] = {
    name: rule for name, rule in _RULES.items() if hasattr(Tensor, name)
} | {"__len__": _length}


def rule_of(target: Any) -> Rule | None:
    """Return the rule of a function, or of a method by its name."""
    if isinstance(target, str):
        return _METHODS.get(target)
    return _FUNCTIONS.get(target)
