"""What a value is to become: the affine maps that travel through a graph.

A **gauge** on a value v says what the new network computes in v's place: s·v ("scale") or v + d
("shift"), with one number for every channel. An affine map y = s·x + t disappears when a gauge on
x or on y makes up for it, and everything else that produces or reads a gauged value can take it.

Because a saved surgery must not hold numbers that belong to the weights, a gauge carries its
vector twice: as numbers, to decide with, and as an expression of the vector that it starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Part = Literal["scale", "shift"]
# Steps from the first vector on, as JSON can hold them; see `step`.
Path = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Gauge:
    """A vector on an axis of a value.

    Attributes:
        axis: the axis, counted from the front; None where one number goes for all entries.
        vector: shape (C,), or (1,) without an axis, float64.
        part: what is done with it: multiplied ("scale") or added ("shift").
        path: how the vector comes from the one that it started as.
    """

    axis: int | None
    vector: Tensor
    part: Part
    path: Path = ()

    def then(self, *entry: Any, axis: int | None, vector: Tensor) -> Gauge:
        """Return the gauge after one more step, whose result is `vector`."""
        return Gauge(axis, vector, self.part, (*self.path, tuple(entry)))

    def moved(self, axis: int | None) -> Gauge:
        """Return the same vector on another axis."""
        return self if axis == self.axis else Gauge(axis, self.vector, self.part, self.path)

    def sliced(self, start: int, stop: int, axis: int | None = None) -> Gauge:
        """Return the entries from `start` to `stop`; a single number stays as it is."""
        if self.axis is None:
            return self
        axis = self.axis if axis is None else axis
        if (start, stop) == (0, len(self.vector)):
            return self.moved(axis)
        return self.then("slice", start, stop, axis=axis, vector=self.vector[start:stop])

    def repeated(self, inner: int, outer: int, axis: int) -> Gauge:
        """Return every entry `inner` times, and all that `outer` times."""
        found = self
        if inner > 1:
            vector = self.vector.repeat_interleave(inner)
            found = found.then("repeat", inner, axis=axis, vector=vector)
        if outer > 1:
            found = found.then("tile", outer, axis=axis, vector=found.vector.repeat(outer))
        return found.moved(axis)

    def same(self, other: Gauge) -> bool:
        """Say whether two gauges are one, entry by entry."""
        if self.axis == other.axis:
            return torch.equal(self.vector, other.vector)
        one, many = (self, other) if self.axis is None else (other, self)
        return one.axis is None and bool((many.vector == one.vector).all())

    def placed(self, start: int, total: int, axis: int) -> Gauge:
        """Return the gauge of a value whose channels from `start` on have this one."""
        size = len(self.vector)
        gauges, sizes = [None, self, None], [start, size, total - start - size]
        if self.axis is None or size == total:
            return self.moved(None if self.axis is None else axis)
        return joined(gauges, sizes, axis, self.part)

    def is_identity(self) -> bool:
        """Say whether nothing is to change."""
        return bool((self.vector == identity(self.part)).all())


def identity(part: Part) -> float:
    """Return the entry that changes nothing."""
    return 1.0 if part == "scale" else 0.0


def joined(gauges: list[Gauge | None], sizes: list[int], axis: int, part: Part) -> Gauge:
    """Return the gauge of values side by side; None stands for a value that stays."""
    parts = [
        torch.full((size,), identity(part), dtype=torch.float64)
        if gauge is None
        else gauge.vector.expand(size)
        for gauge, size in zip(gauges, sizes, strict=True)
    ]
    paths = [None if gauge is None else gauge.path for gauge in gauges]
    return Gauge(axis, torch.cat(parts), part, (("join", tuple(paths), tuple(sizes)),))


def total(gauges: list[Gauge], signs: list[int]) -> Gauge:
    """Return the shift of a sum (or difference) whose operands are shifted."""
    axes = {gauge.axis for gauge in gauges}
    vector = sum(sign * gauge.vector for gauge, sign in zip(gauges, signs, strict=True))
    assert isinstance(vector, Tensor)
    paths = tuple(gauge.path for gauge in gauges)
    axis = next((axis for axis in axes if axis is not None), None)
    return Gauge(axis, vector, "shift", (("sum", paths, tuple(signs)),))


def evaluate(path: Path, start: Tensor, part: Part, scale_of: Callable[[str], Tensor]) -> Tensor:
    """Return the vector at the end of a path.

    Args:
        path: the steps.
        start: the vector at its beginning.
        part: which part of the affine map travels.
        scale_of: the scale that a node of this name multiplies with.
    """
    vector = start
    for kind, *rest in path:
        if kind == "slice":
            vector = vector[rest[0] : rest[1]]
        elif kind == "repeat":
            vector = vector.repeat_interleave(rest[0])
        elif kind == "tile":
            vector = vector.repeat(rest[0])
        elif kind == "minus":
            vector = -vector
        elif kind == "times":
            vector = vector * scale_of(rest[0])
        elif kind == "over":
            vector = vector / scale_of(rest[0])
        elif kind == "sum":
            terms = (
                evaluate(p, start, part, scale_of) * sign for p, sign in zip(*rest, strict=True)
            )
            vector = sum(terms, torch.zeros((), dtype=start.dtype))
        else:
            vector = torch.cat(
                [
                    start.new_full((size,), identity(part))
                    if p is None
                    else evaluate(p, start, part, scale_of).expand(size)
                    for p, size in zip(*rest, strict=True)
                ]
            )
    return vector


def path_from_json(data: Any) -> Any:
    """Turn the lists of a path that was read from JSON into tuples again."""
    return tuple(path_from_json(item) for item in data) if isinstance(data, list) else data
