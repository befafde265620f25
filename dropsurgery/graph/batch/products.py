"""Products: matrices, convolutions, contractions, attention, look-ups in a table."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from dropsurgery.graph.batch.along import last_axis, windowed
from dropsurgery.graph.batch.calls import Call, Found, Rule
from dropsurgery.graph.batch.sizes import ONE, Size
from dropsurgery.graph.batch.values import (
    Place,
    State,
    Value,
    broadcast,
    of_rank,
    over_axes,
    tensor,
    unknown_rank,
)
from dropsurgery.graph.batch.views import inserted


def matmul(call: Call) -> Found:
    """The rule of `matmul`."""
    left, right = call.input, call.tensor(1, "other" if "other" in call.node.kwargs else "mat2")
    if left is None or right is None:
        return call.unknown()
    return multiplied(call, left, right)


def multiplied(call: Call, left: Value, right: Value) -> Value:
    """Return the matrix product of two values of two or more axes."""
    values = (left, right)
    if any(value.batch in (State.UNKNOWN, State.BLENDED) for value in values):
        return unknown_rank(call.name, State.UNKNOWN)
    if not all(value.whole for value in values):
        return _multiplied_behind(call, left, right)
    if min(len(left.sizes), len(right.sizes)) < 2:
        return call.unknown()
    # The sum runs over the last axis of the left and the last but one of the right.
    summed = (left.hits(-1), right.hits(-2))
    if any(summed):
        others = [v for v, hit in zip(values, summed, strict=True) if v.place and not hit]
        return unknown_rank(call.name, State.UNKNOWN if others else State.REDUCED)
    rows, columns = _with_axis(left, -1, ONE), _with_axis(right, -2, ONE)
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


def linear(call: Call) -> Found:
    """The rule of `linear`."""
    weight = call.tensor(1, "weight")
    if weight is None or weight.batch is not State.NONE:
        return call.unknown()
    return last_axis(call, call.input, weight.sizes[0] if len(weight.sizes) == 2 else None)


def conv(axes: int) -> Rule:
    """Return the rule of `conv`."""

    def rule(call: Call) -> Found:
        weight = call.tensor(1, "weight")
        if weight is None or weight.batch is not State.NONE:
            return call.unknown()
        return windowed(call, call.input, axes, call.new_size(axes), [None] * axes)

    return rule


def einsum(call: Call) -> Found:
    """The rule of `einsum`."""
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
    if any(value.place is not None and value.place.made for value in values):
        return call.unknown()
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
    if any(one.batch in (State.UNKNOWN, State.BLENDED) for one in (query, key, value)):
        return unknown_rank(call.name, State.UNKNOWN)
    if key.hits(-2) or value.hits(-2):  # the samples are attended over
        placed = query.place is not None
        return unknown_rank(call.name, State.BLENDED if placed else State.REDUCED)
    if any(over_axes(one, (-2, -1)) is not None for one in (query, key, value)):
        return unknown_rank(call.name, State.UNKNOWN)
    if not all(one.whole for one in (query, key, value)):
        return _multiplied_behind(call, query, value)
    weights = _with_axis(query, -1, ONE)
    heads = [_with_axis(_with_axis(one, -2, ONE), -1, ONE) for one in (key,)]
    return broadcast(call.name, (weights, *heads, _with_axis(value, -2, ONE)), call.algebra)


def embedded(call: Call, indices: Value | None, width: Size | None) -> Value:
    """Return rows of a table, one for each index: a new last axis."""
    if indices is None:
        return call.unknown()
    if not indices.whole:
        return Value(call.name, indices.sizes, indices.rank + 1, indices.batch)
    return inserted(call, indices, len(indices.sizes), call.new_size() if width is None else width)


def embedding(call: Call) -> Found:
    """The rule of `embedding`."""
    weight = call.tensor(1, "weight")
    if weight is None or weight.batch is not State.NONE:
        return call.unknown()
    return embedded(call, call.input, weight.sizes[1] if len(weight.sizes) == 2 else None)


def one_hot(call: Call) -> Found:
    """The rule of `one_hot`."""
    return embedded(call, call.input, None)
