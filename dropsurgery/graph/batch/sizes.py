"""Sizes of axes as expressions in the batch size, exact or opaque.

A size is an integer times a product of symbols. The batch size is the symbol `BATCH`. What does
not stay in this form (a sum, a rounded quotient) becomes a new symbol, the same one for the same
expression, so that two sizes that are computed alike are known to be equal.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

BATCH = "batch"


@dataclass(frozen=True)
class Size:
    """A positive integer factor times a product of symbols, which are sorted."""

    factor: int
    symbols: tuple[str, ...] = ()

    @property
    def number(self) -> int | None:
        """The size, where it is a known number."""
        return None if self.symbols else self.factor

    def __mul__(self, other: Size) -> Size:
        return Size(self.factor * other.factor, tuple(sorted(self.symbols + other.symbols)))

    def over(self, other: Size) -> Size | None:
        """Return the exact quotient; None where the division is not known to leave nothing."""
        if other.factor == 0 or self.factor % other.factor:
            return None
        left = Counter(self.symbols)
        left.subtract(other.symbols)
        if min(left.values(), default=0) < 0:
            return None
        return Size(self.factor // other.factor, tuple(sorted(left.elements())))


ONE = Size(1)
BATCH_SIZE = Size(1, (BATCH,))


def product(sizes: Iterable[Size]) -> Size:
    """Return the product of sizes."""
    return math.prod(sizes, start=ONE)


class Algebra:
    """Arithmetic of sizes; remembers which symbol stands for which expression."""

    def __init__(self) -> None:
        self._names: dict[tuple[Any, ...], str] = {}
        self._sums: dict[str, tuple[Size, int]] = {}
        self._varying = {BATCH}

    def varies(self, size: Size) -> bool:
        """Say whether a size may depend on the batch size."""
        return not self._varying.isdisjoint(size.symbols)

    def opaque(self, *key: Any, varies: bool = False) -> Size:
        """Return the symbol of an expression: the same key, the same symbol."""
        name = self._names.setdefault(key, f"s{len(self._names)}")
        if varies or any(self.varies(part) for part in key if isinstance(part, Size)):
            self._varying.add(name)
        return Size(1, (name,))

    def arithmetic(self, name: str, left: Size, right: Size) -> Size:
        """Return `left <name> right`, for the name of a function of `operator`."""
        if left.number is not None and right.number is not None:
            return self._numbers(name, left.number, right.number)
        if name == "mul":
            return left * right
        if name in ("floordiv", "truediv"):
            quotient = left.over(right)
            return self.opaque(name, left, right) if quotient is None else quotient
        if name == "add" and left.number is not None:
            left, right = right, left
        if name in ("add", "sub") and right.number is not None:
            base, offset = self._sums.get(left.symbols[0], (left, 0))
            if len(left.symbols) > 1 or left.factor != 1:
                base, offset = left, 0
            return self._sum(base, offset + (right.number if name == "add" else -right.number))
        return self.opaque(name, left, right)

    def _sum(self, base: Size, offset: int) -> Size:
        if offset == 0:
            return base
        total = self.opaque("add", base, offset)
        self._sums[total.symbols[0]] = (base, offset)
        return total

    def _numbers(self, name: str, left: int, right: int) -> Size:
        function: Callable[[int, int], Any] | None = getattr(operator, name, None)
        try:
            value = None if function is None else function(left, right)
        except (ArithmeticError, TypeError, ValueError):
            value = None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return Size(value) if isinstance(value, int) else self.opaque(name, left, right)
