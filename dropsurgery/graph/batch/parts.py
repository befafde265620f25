"""Parts of a tensor, and tensors put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from dropsurgery.graph.batch.along import along, reduced
from dropsurgery.graph.batch.calls import Call, Found, Parts, Shape
from dropsurgery.graph.batch.numbers import size_at
from dropsurgery.graph.batch.sizes import ONE, Size
from dropsurgery.graph.batch.values import (
    Place,
    Rank,
    State,
    Value,
    broadcast,
    extended,
    over_axes,
    unknown_rank,
)
from dropsurgery.graph.batch.views import inserted


def split(call: Call) -> Found:
    """The rule of `split`."""
    value, dim = call.input, call.argument(2, "dim", 0)
    if value is None:
        return call.unknown()
    return Parts(each=along(call, value, (dim,), resize=True))


def unbind(call: Call) -> Found:
    """The rule of `unbind`."""
    value, dim = call.input, call.argument(1, "dim", 0)
    if value is None:
        return call.unknown()
    part = reduced(call, value, (dim,), keep=False)
    if part.batch is State.REDUCED and value.place is not None:
        taken = State.BLENDED if value.is_plain else State.UNKNOWN
        return Parts(each=replace(part, batch=taken))
    return Parts(each=part)


def cat(call: Call) -> Found:
    """The rule of `cat`."""
    values = call.list_of(call.argument(0, "tensors"))
    dim = call.argument(1, "dim", call.node.kwargs.get("axis", 0))
    if not values:
        return call.unknown()
    return joined(call, values, dim)


def joined(call: Call, values: Sequence[Value], dim: Any) -> Value:
    """Return values side by side along an axis."""
    first = next((value for value in values if value.whole), values[0])
    placed = [value for value in values if value.place is not None]
    if any(value.batch in (State.UNKNOWN, State.BLENDED) for value in values):
        return unknown_rank(call.name, State.UNKNOWN)  # parts of samples may be put together again
    if len(placed) > 0:
        # All have one rank, and the same sizes but along `dim`.
        hits = [over_axes(value, (dim,)) for value in placed]
        if State.UNKNOWN in hits and first.axis(dim) is None:
            return unknown_rank(call.name, State.UNKNOWN)
    axis = first.axis(dim)
    places = {value.place for value in placed}
    batch: Place | State = State.NONE
    if len(places) == 1:
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
    varying = [v.sizes[axis] for v in values if axis is not None and axis < len(v.sizes)]
    along = next((size for size in varying if call.algebra.varies(size)), None)
    sizes = [call.new_size(0, along) if a == axis else s for a, s in enumerate(first.sizes)]
    if isinstance(batch, Place):
        sizes[batch.axis] = batch.size
    return Value(call.name, tuple(sizes), first.rank, batch)


def stack(call: Call) -> Found:
    """The rule of `stack`."""
    values, dim = call.list_of(call.argument(0, "tensors")), call.argument(1, "dim", 0)
    if not values or type(dim) is not int:
        return call.unknown()
    common = broadcast(call.name, values, call.algebra)
    if dim < 0:
        if not common.whole:
            return call.unknown()
        dim += len(common.sizes) + 1
    return inserted(call, common, dim, call.new_size())


def getitem(call: Call) -> Found:
    """The rule of `getitem`."""
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
        return size_at(call, found, index)
    if not isinstance(found, Value):
        return call.unknown()
    return indexed(call, found, list(index) if isinstance(index, tuple) else [index])


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
    found = _take(call, value, parts)
    # Parts of samples in another order may be the samples again.
    lost = found.batch is State.BLENDED and not value.is_plain
    return replace(found, batch=State.UNKNOWN) if lost else found


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
            sizes.append(value.sizes[old] if full else call.new_size(old, value.sizes[old]))
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


def select(call: Call) -> Found:
    """The rule of `select`."""
    found = unbind(call)
    return found.each if isinstance(found, Parts) else found


def gather(call: Call) -> Found:
    """The rule of `gather`."""
    value, dim, index = call.input, call.argument(1, "dim"), call.tensor(2, "index")
    if value is None or index is None:
        return call.unknown()
    both = [one for one in (value, index) if one.place is not None]
    same = len({one.place for one in both}) == 1 and len(both) == 2
    if same and over_axes(index, (dim,)) is None:
        return replace(index, name=call.name)
    return call.unknown()
