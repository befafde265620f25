"""What the rules of shapes are given, and how two shapes become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from dropsurgery.graph.affine import argument

Shape = tuple[int | None, ...]


class Contradiction(Exception):
    """These shapes cannot be: torch would raise an error on them."""


@dataclass(frozen=True)
class Call:
    """A node with what is known of its inputs.

    Attributes:
        root: the module that the graph belongs to.
        node: the node.
        called: the module that it calls, if it calls one.
        shapes: shapes of the nodes before it.
    """

    root: nn.Module
    node: fx.Node
    called: nn.Module | None
    shapes: Mapping[fx.Node, Shape | None]

    def shape(self, value: Any) -> Shape | None:
        """Return the shape of an argument; a number's is ()."""
        if isinstance(value, fx.Node):
            return self.shapes.get(value)
        return () if isinstance(value, int | float) else None

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument by position or by name."""
        return argument(self.node, index, name, default)

    @property
    def input(self) -> Shape | None:
        """The shape of the first argument."""
        return self.shape(self.argument(0, "input", self.node.kwargs.get("x")))


Rule = Callable[[Call], Shape | None]


def merge(left: int | None, right: int | None) -> int | None:
    """Return the size that two equal sizes have."""
    if left is None or right is None:
        return right if left is None else left
    if left != right:
        raise Contradiction(f"{left} is not {right}")
    return left


def broadcast(left: Shape | None, right: Shape | None) -> Shape | None:
    """Return the shape of an elementwise operation on two tensors."""
    if left is None or right is None:
        return None
    rank = max(len(left), len(right))
    pairs = zip((1,) * (rank - len(left)) + left, (1,) * (rank - len(right)) + right, strict=True)
    return tuple(_broadcast_size(a, b) for a, b in pairs)


def _broadcast_size(left: int | None, right: int | None) -> int | None:
    if left == 1:
        return right
    if right == 1:
        return left
    return merge(left, right)  # an unknown size against n > 1 is n or 1, and the result n
