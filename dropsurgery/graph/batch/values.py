"""Values of a graph as far as their batch is concerned, and how they combine.

A tensor's batch stands within one of its axes: `outer` entries of other things around it and
`inner` within it, in row-major order, so that a reshape can be followed through merged axes and
back. With both 1 the axis is the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from dropsurgery.graph.batch.sizes import BATCH_SIZE, ONE, Algebra, Size, product


class State(Enum):
    """What is known of a tensor whose batch stands on no axis."""

    NONE = auto()  # it does not depend on the batch
    REDUCED = auto()  # the samples are taken together: no axis is left of them
    BLENDED = auto()  # no axis holds the samples one by one, in their order
    UNKNOWN = auto()


@dataclass(frozen=True)
class Place:
    """Where the batch is: axis `axis` has outer · B · inner entries, in row-major order.

    `made`: the tensor was made with the size of the batch and holds no sample's values.
    """

    axis: int
    outer: Size = ONE
    inner: Size = ONE
    made: bool = field(default=False, compare=False)

    @property
    def alone(self) -> bool:
        """Whether the axis is the batch and nothing else."""
        return self.outer == ONE and self.inner == ONE

    @property
    def size(self) -> Size:
        """The number of entries of the axis."""
        return self.outer * BATCH_SIZE * self.inner


@dataclass(frozen=True)
class Rank:
    """A number of axes: `offset`, or that of some value of unknown rank plus `offset`."""

    offset: int
    of: str = ""

    @property
    def known(self) -> int | None:
        """The rank, where it is a known number."""
        return None if self.of else self.offset

    def __add__(self, more: int) -> Rank:
        return Rank(self.offset + more, self.of)

    def minus(self, other: Rank) -> int | None:
        """Return the difference of two ranks; None where it is not known."""
        return self.offset - other.offset if self.of == other.of else None


@dataclass(frozen=True)
class Value:
    """A tensor.

    Attributes:
        name: what its unnamed axes are called after.
        sizes: the sizes of its leading axes, as many as there are known to be.
        rank: the number of its axes.
        batch: where the batch is.
    """

    name: str
    sizes: tuple[Size, ...]
    rank: Rank
    batch: Place | State

    @property
    def place(self) -> Place | None:
        """Where the batch is, if it is on an axis."""
        return self.batch if isinstance(self.batch, Place) else None

    @property
    def is_plain(self) -> bool:
        """Whether taking or moving entries along the batch's axis surely leaves none that is it.

        Where other things share the axis, or samples were put in another order before, what is
        taken or moved may be the samples in their order again.
        """
        return self.batch is not State.BLENDED and (self.place is None or self.place.alone)

    @property
    def whole(self) -> bool:
        """Whether all axes are known."""
        return self.rank.known is not None

    def axis(self, dim: object) -> int | None:
        """Return an axis counted from the front; None where that is not known."""
        if not isinstance(dim, int):
            return None
        if dim >= 0:
            return dim
        return None if self.rank.known is None else dim + self.rank.known

    def axes(self, dims: Iterable[object]) -> list[int]:
        """Return those axes, counted from the front, of which that is known."""
        return [axis for axis in map(self.axis, dims) if axis is not None]

    def hits(self, dim: object) -> bool | None:
        """Say whether an axis is the one that the batch is on; None where that is not known."""
        if self.place is None:
            return False
        axis = self.axis(dim)
        if axis is not None:
            return axis == self.place.axis
        if isinstance(dim, int) and len(self.sizes) + dim > self.place.axis:
            return False
        return None


def tensor(name: str, sizes: Sequence[Size], batch: Place | State) -> Value:
    """Return a value all of whose axes are known."""
    return Value(name, tuple(sizes), Rank(len(sizes)), batch)


def unknown_rank(name: str, batch: Place | State, sizes: Sequence[Size] = ()) -> Value:
    """Return a value of which at most some leading axes are known."""
    return Value(name, tuple(sizes), Rank(0, name), batch)


def size_of(algebra: Algebra, value: Value, axis: int) -> Size:
    """Return the size of an axis, counted from the front, if need be as a new symbol."""
    if 0 <= axis < len(value.sizes):
        return value.sizes[axis]
    varies = value.batch in (State.UNKNOWN, State.BLENDED)
    return algebra.opaque("axis", value.name, axis, varies=varies)


def extended(algebra: Algebra, value: Value, count: int) -> Value:
    """Return a value that is known to have at least `count` axes."""
    if count <= len(value.sizes) or value.whole:
        return value
    more = (size_of(algebra, value, axis) for axis in range(len(value.sizes), count))
    return replace(value, sizes=(*value.sizes, *more))


def of_rank(algebra: Algebra, value: Value, rank: int) -> Value:
    """Return a value that is known to have exactly `rank` axes."""
    if value.whole:
        return value
    sizes = extended(algebra, value, rank).sizes[:rank]
    return replace(value, sizes=sizes, rank=Rank(rank))


def from_sizes(name: str, sizes: Sequence[Size], algebra: Algebra) -> Value:
    """Return a new tensor of these sizes that holds no sample's values."""
    exact = [axis for axis, size in enumerate(sizes) if size == BATCH_SIZE]
    varying = [axis for axis, size in enumerate(sizes) if algebra.varies(size)]
    batch: Place | State = State.NONE
    if varying:
        batch = (
            Place(exact[0], made=True) if exact == varying and len(exact) == 1 else State.UNKNOWN
        )
    return tensor(name, sizes, batch)


def broadcast(name: str, values: Sequence[Value], algebra: Algebra) -> Value:
    """Return what an elementwise operation makes of tensors."""
    if any(value.batch is State.UNKNOWN for value in values):
        return unknown_rank(name, State.UNKNOWN)
    first = values[0]
    if all(v.rank == first.rank and v.sizes == first.sizes and v.batch == first.batch
           for v in values[1:]):  # fmt: skip
        made = all(v.place is None or v.place.made for v in values)
        return first if first.place is None or first.place.made == made else values[-1]
    largest = _largest(values)
    if largest is None:
        still = all(value.batch is State.NONE for value in values)
        return unknown_rank(name, State.NONE if still else State.UNKNOWN)
    shifts = [largest.rank.minus(value.rank) for value in values]
    places: list[Place] = []
    for value, shift in zip(values, shifts, strict=True):
        if value.place is not None:
            if shift is None:
                return unknown_rank(name, State.UNKNOWN)
            places.append(replace(value.place, axis=value.place.axis + shift))
    sizes = _common_sizes(largest, values, shifts, algebra)
    batch = _common_place(values, places)
    if isinstance(batch, Place) and batch.axis < len(sizes):
        sizes[batch.axis] = batch.size
    return Value(name, tuple(sizes), largest.rank, batch)


def _largest(values: Sequence[Value]) -> Value | None:
    """Return the value that is known to have the most axes."""
    for value in values:
        differences = [_at_least(value, other) for other in values]
        if all(differences):
            return value
    return None


def _at_least(value: Value, other: Value) -> bool:
    difference = value.rank.minus(other.rank)
    if difference is not None:
        return difference >= 0
    return other.rank.known is not None and len(value.sizes) >= other.rank.known


def _common_sizes(
    largest: Value, values: Sequence[Value], shifts: Sequence[int | None], algebra: Algebra
) -> list[Size]:
    sizes = list(largest.sizes)
    for value, shift in zip(values, shifts, strict=True):
        if shift is None:
            # It may be spread over any axis of one entry.
            sizes = [
                algebra.opaque("spread", largest.name, value.name, axis) if size == ONE else size
                for axis, size in enumerate(sizes)
            ]
            continue
        for axis, size in enumerate(value.sizes, start=shift):
            if axis < len(sizes):
                sizes[axis] = _common_size(sizes[axis], size, algebra)
            elif axis == len(sizes):
                sizes.append(size)
    return sizes


def _common_size(left: Size, right: Size, algebra: Algebra) -> Size:
    if left == right or right == ONE:
        return left
    if left == ONE:
        return right
    if right.number is not None:
        return right  # the other one is equal, or 1
    if left.number is not None:
        return left
    return algebra.opaque("common", *sorted((left, right), key=lambda s: (s.factor, s.symbols)))


def _common_place(values: Sequence[Value], places: Sequence[Place]) -> Place | State:
    if any(value.batch is State.BLENDED for value in values):
        return State.BLENDED
    if not places:
        reduced = any(value.batch is State.REDUCED for value in values)
        return State.REDUCED if reduced else State.NONE
    if len(set(places)) == 1:
        return replace(places[0], made=all(place.made for place in places))
    crossed = len({place.axis for place in places if not place.made}) > 1
    return State.BLENDED if crossed else State.UNKNOWN


def laid_out(name: str, value: Value, target: Sequence[Size | None], algebra: Algebra) -> Value:
    """Return a value with its entries laid out anew, in row-major order.

    Args:
        name: of the new value.
        value: the tensor.
        target: the new sizes; None for the one that is left to be inferred.
        algebra: of the sizes.
    """
    total = product(value.sizes) if value.whole else None
    given = product(size for size in target if size is not None)
    rest = None if total is None else total.over(given)
    place = value.place
    sizes: list[Size] = []
    for axis, size in enumerate(target):
        varies = place is not None or value.batch in (State.UNKNOWN, State.BLENDED)
        left = algebra.opaque("rest", name, axis, varies=varies) if rest is None else rest
        sizes.append(left if size is None else size)
    if place is None:
        still = value.batch in (State.NONE, State.REDUCED) and not any(map(algebra.varies, sizes))
        # What was put side by side may part again.
        return tensor(name, sizes, value.batch if still else State.UNKNOWN)
    known = [rest if size is None else size for size in target]
    return tensor(name, sizes, _place_in(known, _outer(value, place)))


def _outer(value: Value, place: Place) -> tuple[Size, Size]:
    """Return how many entries lie around the batch, of the whole tensor; and that times B."""
    outer = product(value.sizes[: place.axis]) * place.outer
    return outer, outer * BATCH_SIZE


def _place_in(sizes: Sequence[Size | None], outer: tuple[Size, Size]) -> Place | State:
    """Return where the batch is in new axes, given what lies around it in row-major order."""
    around, through = outer
    before = ONE
    for axis, size in enumerate(sizes):
        left = around.over(before)
        if size is None or left is None:
            return State.UNKNOWN
        before = before * size
        inner = before.over(through)
        if inner is not None:
            return Place(axis, left, inner)
    return State.UNKNOWN


def permuted(name: str, value: Value, order: Sequence[int]) -> Value:
    """Return a value of known rank with its axes in another order."""
    place = value.place
    batch = value.batch if place is None else replace(place, axis=list(order).index(place.axis))
    return Value(name, tuple(value.sizes[axis] for axis in order), value.rank, batch)


def over_axes(value: Value, dims: Iterable[object]) -> State | None:
    """Return what becomes of the batch when entries along these axes are mixed or moved.

    Returns:
        BLENDED where the batch is on one of them, UNKNOWN where that is not known, else None.
    """
    hits = [value.hits(dim) for dim in dims]
    if any(hits):
        return State.BLENDED
    return State.UNKNOWN if None in hits else None
