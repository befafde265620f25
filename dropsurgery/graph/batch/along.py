"""Operations along some axes: reductions, windows, margins, normalisation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from dropsurgery.graph.batch.calls import Call, Found, Parts, Rule
from dropsurgery.graph.batch.sizes import ONE, Size
from dropsurgery.graph.batch.values import (
    Place,
    State,
    Value,
    extended,
    of_rank,
    over_axes,
    tensor,
    unknown_rank,
)


def along(call: Call, value: Value, dims: Iterable[object], *, resize: bool = False) -> Value:
    """Return a value whose entries are mixed along some axes; `resize`: taken or moved.

    The rank stays.
    """
    dims = list(dims)
    state = over_axes(value, dims)
    if resize and (state is not None or value.batch is State.BLENDED) and not value.is_plain:
        state = State.UNKNOWN
    if state is not None and not value.whole:
        return unknown_rank(call.name, state)
    value = replace(value, name=call.name, batch=value.batch if state is None else state)
    if not resize:
        return value
    axes = {value.axis(dim) for dim in dims}
    if None in axes:  # behind the batch, and no more is known
        keep = 0 if value.place is None else value.place.axis + 1
        return replace(value, sizes=value.sizes[:keep])
    sizes = (call.new_size(a, s) if a in axes else s for a, s in enumerate(value.sizes))
    return replace(value, sizes=tuple(sizes))


def along_axes(index: int, default: Any = None, *, resize: bool = False) -> Rule:
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
    last = last or [None] * axes
    sizes = [call.new_size(n) if size is None else size for n, size in enumerate(last)]
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


def normalised(call: Call, value: Value, axes: int) -> Value:
    """Return a value normalised over its last axes, whose sizes are fixed: none is the batch."""
    if value.whole:
        return along(call, value, range(-axes, 0))
    return value


def layer_norm(call: Call) -> Found:
    """The rule of `layer_norm`."""
    shape = call.argument(1, "normalized_shape")
    if call.input is None or not isinstance(shape, tuple | list):
        return call.unknown()
    return normalised(call, call.input, len(shape))


def reduction(call: Call) -> Found:
    """The rule of `reduction`."""
    value = call.input
    if value is None:
        return call.unknown()
    dims = call.argument(1, "dim", call.node.kwargs.get("axis"))
    keep = call.argument(2, "keepdim", False) is True
    if isinstance(dims, fx.Node):
        return call.unknown()  # max(x, y), or axes that are computed
    if dims is None or dims == ():
        still = value.batch in (State.NONE, State.UNKNOWN)
        blank = value.batch if still else State.REDUCED
        return tensor(call.name, (), blank)
    return reduced(call, value, dims if isinstance(dims, tuple | list) else (dims,), keep=keep)


def reduced(call: Call, value: Value, dims: Sequence[Any], *, keep: bool) -> Value:
    """Return a value reduced over some axes."""
    hits = [value.hits(dim) for dim in dims]
    if None in hits or value.batch in (State.UNKNOWN, State.BLENDED):
        return unknown_rank(call.name, State.UNKNOWN)
    axes = value.axes(dims)
    batch: Place | State = State.REDUCED if any(hits) else value.batch
    if len(axes) < len(dims):
        place = value.place
        head = () if place is None else value.sizes[: place.axis + 1]
        return unknown_rank(call.name, batch, head)
    value = extended(call.algebra, value, max(axes, default=0) + 1)
    if keep:
        sizes = tuple(ONE if axis in axes else size for axis, size in enumerate(value.sizes))
        return Value(call.name, sizes, value.rank, batch)
    sizes = tuple(size for axis, size in enumerate(value.sizes) if axis not in axes)
    if isinstance(batch, Place):
        before = sum(axis < batch.axis for axis in axes)
        batch = replace(batch, axis=batch.axis - before)
    return Value(call.name, sizes, value.rank + -len(set(axes)), batch)


def variance(call: Call) -> Found:
    """The rule of `variance`."""
    return (
        reduction(call)
        if set(call.node.kwargs) <= {"dim", "keepdim", "unbiased"} and len(call.node.args) < 3
        else call.unknown()
    )


def pair_reduction(call: Call) -> Found:
    """max, min and their kin: over all, element by element, or a pair (values, indices)."""
    other = call.argument(1, "dim", call.node.kwargs.get("other"))
    if isinstance(other, fx.Node):
        return call.elementwise() if isinstance(call.find(other), Value) else call.unknown()
    found = reduction(call)
    return Parts(each=found) if other is not None and isinstance(found, Value) else found


def pair_along(call: Call) -> Found:
    """The rule of `pair_along`."""
    found = along_axes(1, -1, resize=True)(call)
    return Parts(each=found) if isinstance(found, Value) else found


def topk(call: Call) -> Found:
    """The rule of `topk`."""
    found = along_axes(2, -1, resize=True)(call)
    return Parts(each=found) if isinstance(found, Value) else found


def roll(call: Call) -> Found:
    """The rule of `roll`."""
    value, dims = call.input, call.argument(2, "dims")
    if value is None:
        return call.unknown()
    if dims is None:  # all entries as one row
        blended = value.place is not None
        return replace(value, name=call.name, batch=State.BLENDED) if blended else call.unknown()
    return moved(call, value, dims if isinstance(dims, tuple | list) else (dims,))


def moved(call: Call, value: Value, dims: Iterable[object]) -> Value:
    """Return a value with its entries along some axes in another order."""
    dims = list(dims)
    hit = over_axes(value, dims) is not None or value.batch is State.BLENDED
    if hit and not value.is_plain:
        return call.unknown()
    return along(call, value, dims)


def flip(call: Call) -> Found:
    """The rule of `flip`."""
    value, dims = call.input, call.dims(1, "dims")
    return call.unknown() if value is None or dims is None else moved(call, value, dims)


def pad(call: Call) -> Found:
    """The rule of `pad`."""
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
        new = (call.new_size(n) if size is None else size for n, size in enumerate(sizes))
        return replace(value, name=call.name, sizes=(*kept, *new))
    return trailing(call, value, axes, sizes)


def resample(call: Call) -> Found:
    """The rule of `interpolate`: (N, C, …)."""
    value = call.input
    if value is None or (value.place is not None and value.place.axis > 1):
        return call.unknown()
    new = (call.new_size(axis) for axis in range(2, len(value.sizes)))
    return replace(value, name=call.name, sizes=(*value.sizes[:2], *new))


def fft(call: Call) -> Found:
    """Transforms over two axes, the last two unless `dim` says which."""
    value, dims = call.input, call.argument(2, "dim", (-2, -1))
    if value is None or not isinstance(dims, tuple | list):
        return call.unknown()
    return along(call, value, dims, resize=True)


def pool(axes: int) -> Rule:
    """Return the rule of `pool`."""

    def rule(call: Call) -> Found:
        found = windowed(call, call.input, axes, None, [None] * axes)
        return Parts(each=found) if call.node.kwargs.get("return_indices") is True else found

    return rule


def index_select(call: Call) -> Found:
    """The rule of `index_select`."""
    value, index = call.input, call.tensor(2, "index")
    if value is None or index is None or index.batch is not State.NONE:
        return call.unknown()
    return along(call, value, (call.argument(1, "dim"),), resize=True)


def narrow(call: Call) -> Found:
    """The rule of `narrow`."""
    value = call.input
    return (
        call.unknown()
        if value is None
        else along(call, value, (call.argument(1, "dim"),), resize=True)
    )


def norm(call: Call) -> Found:
    """`x.norm(p, dim, keepdim)`."""
    value, dims = call.input, call.argument(2, "dim")
    if value is None or dims is None:
        return call.unknown()
    keep = call.argument(3, "keepdim", False) is True
    return reduced(call, value, dims if isinstance(dims, tuple | list) else (dims,), keep=keep)
