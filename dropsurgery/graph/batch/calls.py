"""What a batch rule may ask of a call: its arguments as tensors, sizes and lists of sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from dropsurgery.graph.affine import argument
from dropsurgery.graph.batch.sizes import Algebra, Size
from dropsurgery.graph.batch.values import State, Value, broadcast, tensor, unknown_rank


@dataclass(frozen=True)
class Parts:
    """A tuple of values; `each` stands for all of them where they are alike."""

    items: tuple[Any, ...] = ()
    each: Value | None = None

    def __getitem__(self, index: int) -> Any:
        if self.each is not None:
            return self.each
        return self.items[index] if -len(self.items) <= index < len(self.items) else None


@dataclass(frozen=True)
class Shape:
    """The sizes of a tensor, or a stretch of them; `of` where it is all of an unknown rank."""

    sizes: tuple[Size, ...]
    of: fx.Node | None = None


# A tensor, a tuple, a size, a list of sizes; None for any other Python value.
Found = Value | Parts | Size | Shape | None


@dataclass(slots=True)
class Call:
    """A node with what is known of the values before it.

    Attributes:
        node: the node.
        called: the module that it calls, if it calls one.
        known: what is known of the nodes before it.
        algebra: of all sizes of the graph.
    """

    node: fx.Node
    called: nn.Module | None
    known: dict[fx.Node, Found]
    algebra: Algebra

    @property
    def name(self) -> str:
        """The node's name, which its new axes are called after."""
        return self.node.name

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument by position or by name."""
        return argument(self.node, index, name, default)

    def find(self, value: Any) -> Found:
        """Return what is known of an argument."""
        if isinstance(value, fx.Node):
            return self.known.get(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return Size(value)
        return None

    def tensor(self, index: int, name: str) -> Value | None:
        """Return an argument, if it is a tensor."""
        found = self.find(self.argument(index, name))
        return found if isinstance(found, Value) else None

    @property
    def input(self) -> Value | None:
        """The first argument, if it is a tensor."""
        default = self.node.kwargs.get("x", self.node.kwargs.get("query"))
        found = self.find(self.argument(0, "input", default))
        return found if isinstance(found, Value) else None

    def tensors(self) -> list[Value]:
        """Return all arguments that are tensors."""
        found = (self.find(node) for node in self.node.all_input_nodes)
        return [value for value in found if isinstance(value, Value)]

    def list_of(self, value: Any) -> list[Value] | None:
        """Return the tensors of a list argument."""
        found = self.find(value) if isinstance(value, fx.Node) else None
        items = list(value) if isinstance(value, list | tuple) else None
        values = [self.find(item) for item in items] if items is not None else None
        if isinstance(found, Parts):
            values = list(found.items) if found.each is None else [found.each]
        tensors = [item for item in values or () if isinstance(item, Value)]
        return tensors if values is not None and len(tensors) == len(values) else None

    def rest(self, index: int, *names: str) -> list[Any]:
        """Return a list of numbers, given as one tuple or as several arguments."""
        given = self.node.args[index:]
        if not given:
            named = [self.node.kwargs[name] for name in names if name in self.node.kwargs]
            given = tuple(named[:1])
        if len(given) == 1 and isinstance(given[0], tuple | list):
            return list(given[0])
        return list(given)

    def dims(self, index: int, *names: str) -> list[Any] | None:
        """Return literal axes; None where they are missing or no literals."""
        dims = self.rest(index, *names)
        return dims if dims and all(type(dim) is int for dim in dims) else None

    def sizes(self, index: int, *names: str) -> list[Size | None] | None:
        """Return a list of new sizes, None for -1; None for the list where it is not known."""
        return self.as_sizes(self.rest(index, *names))

    def as_sizes(self, items: Sequence[Any]) -> list[Size | None] | None:
        """Return literal and computed sizes."""
        if len(items) == 1 and isinstance(self.find(items[0]), Shape):
            shape = self.find(items[0])
            assert isinstance(shape, Shape)
            return None if shape.of is not None else list(shape.sizes)
        found: list[Size | None] = []
        for item in items:
            size = self.find(item)
            if not isinstance(size, Size):
                return None
            found.append(None if size.number is not None and size.number < 0 else size)
        return found

    def unknown(self) -> Value:
        """Return what is known of the output of an operation that has no rule.

        What depends on the batch nowhere before it does not depend on it afterwards.
        """
        still = all(self._is_still(self.known.get(node)) for node in self.node.all_input_nodes)
        return unknown_rank(self.name, State.NONE if still else State.UNKNOWN)

    def _is_still(self, found: Found) -> bool:
        if isinstance(found, Value):
            return found.batch is State.NONE
        if isinstance(found, Parts):
            items = found.items if found.each is None else (found.each,)
            return all(self._is_still(item) for item in items)
        sizes = found.sizes if isinstance(found, Shape) else (found,)
        return not any(isinstance(s, Size) and self.algebra.varies(s) for s in sizes)

    def elementwise(self) -> Value:
        """Return what an operation on each entry makes of all tensor arguments."""
        values = self.tensors()
        # A Python number that is computed from the batch size makes no axis.
        return (
            broadcast(self.name, values, self.algebra)
            if values
            else tensor(self.name, (), State.NONE)
        )

    def new_size(self, number: int = 0, old: Size | None = None) -> Size:
        """Return a new size, of which nothing is known but whether it may vary as an old one."""
        varies = old is not None and self.algebra.varies(old)
        return self.algebra.opaque("new", self.name, number, varies=varies)


Rule = Callable[[Call], Found]
