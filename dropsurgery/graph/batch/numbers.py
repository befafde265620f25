"""Sizes that a forward reads and computes with, and tensors that it makes of them."""

from __future__ import annotations

import builtins
import math
from typing import Any

from torch import fx

from dropsurgery.graph.batch.calls import Call, Found, Parts, Rule, Shape
from dropsurgery.graph.batch.sizes import Size, product
from dropsurgery.graph.batch.values import (
    State,
    Value,
    extended,
    from_sizes,
    permuted,
    size_of,
    tensor,
)
from dropsurgery.graph.batch.views import same, transposed


def size(call: Call) -> Found:
    """The rule of `size`."""
    value, dim = call.input, call.argument(1, "dim")
    if value is None:
        return None
    node = call.argument(0, "input")
    shape = Shape(value.sizes, None if value.whole else node)
    return shape if dim is None else size_at(call, shape, dim)


def size_at(call: Call, shape: Shape, index: Any) -> Found:
    """The rule of `size_at`."""
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


def attribute(call: Call) -> Found:
    """The rule of `attribute`."""
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
    return same(call) if name in ("data", "real", "imag") else None


def numel(call: Call) -> Found:
    """The rule of `numel`."""
    value = call.input
    return product(value.sizes) if value is not None and value.whole else None


def length(call: Call) -> Found:
    """The rule of `length`."""
    found = call.find(call.argument(0, "input"))
    if isinstance(found, Value) and found.sizes:
        return found.sizes[0]
    return Size(len(found.sizes)) if isinstance(found, Shape) and found.of is None else None


def new(*names: str, index: int = 0) -> Rule:
    """Return the rule of `new`."""

    def rule(call: Call) -> Found:
        sizes = call.sizes(index, *names)
        if sizes is None or None in sizes:
            return call.unknown()
        return from_sizes(call.name, [s for s in sizes if s is not None], call.algebra)

    return rule


def new_full(call: Call) -> Found:
    """`x.new_full(size, value)`."""
    given = call.argument(1, "size")
    sizes = call.as_sizes(list(given) if isinstance(given, tuple | list) else [given])
    if sizes is None or None in sizes:
        return call.unknown()
    return from_sizes(call.name, [s for s in sizes if s is not None], call.algebra)


def arange(call: Call) -> Found:
    """The rule of `arange`."""
    ends = [call.find(value) for value in call.node.args]
    if len(ends) == 1 and isinstance(ends[0], Size):
        return from_sizes(call.name, ends, call.algebra)  # type: ignore[arg-type]
    found = call.unknown()
    return tensor(call.name, (call.new_size(),), found.batch)


def meshgrid(call: Call) -> Found:
    """The rule of `meshgrid`."""
    return Parts(each=call.unknown())


def arithmetic(name: str) -> Rule:
    """Return the rule of `arithmetic`."""

    def rule(call: Call) -> Found:
        operands = (call.argument(0, "input"), call.argument(1, "other"))
        left, right = (call.find(value) for value in operands)
        if isinstance(left, Size) and isinstance(right, Size):
            return call.algebra.arithmetic(name, left, right)
        if isinstance(left, Shape) or isinstance(right, Shape):
            return _joined_sizes(call) if name == "add" else None
        tensors = any(isinstance(value, Value | Parts) for value in (left, right))
        return call.elementwise() if tensors else python(call)

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


def python(call: Call) -> Found:
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
