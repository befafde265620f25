"""The affine maps y = s·x + t of single channels, in whatever form a network writes them.

A BatchNorm in eval mode, layer scale, input normalisation, a factor: one kind of thing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropsurgery.graph.affine import Affine, Norm, argument, is_norm, read_norm
from dropsurgery.graph.constants import constant
from dropsurgery.graph.leaves import forward_owner, has_hooks


@dataclass(frozen=True)
class ChannelMap:
    """A node that computes y = s·x + t, channel by channel.

    Attributes:
        label: what it is, for messages.
        data: the node that it maps.
        affine: s and t, each of shape (C,), or (1,) where one number goes for all channels.
        axis: the channels' axis, negative where it is counted from the end; None for one number.
        scales: whether it multiplies.
        shifts: whether it adds.
        norm: the BatchNorm, if it is one.
        dtype: the dtype that takes part in type promotion, if one does.
        rank: how many axes a constant has, to which the data's are broadcast.
    """

    label: str
    data: fx.Node
    affine: Affine
    axis: int | None
    scales: bool
    shifts: bool
    norm: Norm | None = None
    dtype: torch.dtype | None = None
    rank: int = 0

    @property
    def tail(self) -> tuple[str, ...]:
        """Names of the submodules that run behind the map."""
        return () if self.norm is None else self.norm.tail


@dataclass(frozen=True)
class Operand:
    """An elementwise operation of a value and a constant.

    Attributes:
        data: the value.
        constant: the other operand.
        kind: "mul", "div", "add" or "sub".
        operand: the constant, as the node has it.
    """

    data: fx.Node
    constant: Tensor
    kind: str
    operand: Any


ADDS: Mapping[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), "sub"),
}
PRODUCTS: Mapping[Any, str] = {
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), "mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), "div"),
}
_KINDS: Mapping[Any, str] = {**ADDS, **PRODUCTS}


def operands(node: fx.Node) -> tuple[str, Any, Any] | None:
    """Return the kind and the operands of a sum, difference, product or quotient of two values."""
    if node.op not in ("call_function", "call_method"):
        return None
    kind = _KINDS.get(node.target)
    if kind is None or not set(node.kwargs) <= {"input", "other"}:
        return None
    return kind, argument(node, 0, "input"), argument(node, 1, "other")


def read_operand(root: fx.GraphModule, node: fx.Node) -> Operand | None:
    """Read an elementwise operation of a value and a constant; None for anything else."""
    found = operands(node)
    if found is None:
        return None
    kind, left, right = found
    values = (_tensor(constant(root, left)), _tensor(constant(root, right)))
    if (values[0] is None) == (values[1] is None):
        return None
    swapped = values[0] is not None
    data, operand = (right, left) if swapped else (left, right)
    value = values[0] if swapped else values[1]
    usable = value is not None and value.is_floating_point() and not value.is_meta
    if not usable or not isinstance(data, fx.Node) or (swapped and kind in ("div", "sub")):
        return None
    assert value is not None
    return Operand(data, value, kind, operand)


def _tensor(value: Tensor | int | float | None) -> Tensor | None:
    if isinstance(value, int | float):
        return torch.tensor(float(value), dtype=torch.float64)
    return value


def read_map(root: fx.GraphModule, node: fx.Node, called: nn.Module | None) -> ChannelMap | None:
    """Read the affine map that a node computes; None where it computes none.

    Raises:
        Refused: it is a BatchNorm whose statistics are not fixed, or not one that is known.
    """
    if is_norm(node, called):
        norm = read_norm(root, node, called)
        kind = norm.tensors[0].dtype if norm.promotes else None
        return ChannelMap(norm.label, norm.data, norm.affine(), 1, True, True, norm, kind)
    if called is not None:
        return _classic(node, called)
    found = read_operand(root, node)
    return None if found is None else _operand_map(node, found)


_CLASSIC = "dropsurgery.layers.classic_dropout.ClassicDropout"


def _classic(node: fx.Node, called: Any) -> ChannelMap | None:
    """Dropout as it was first written multiplies with 1 - p in eval."""
    if forward_owner(called) != _CLASSIC or called.training or has_hooks(called):
        return None
    data = argument(node, 0, "x")
    if not isinstance(data, fx.Node):
        return None
    label = f"{type(called).__name__} '{node.target}'"
    factor = Affine(_vector(1.0 - called.p), _vector(0.0))
    return ChannelMap(label, data, factor, None, True, False)


def _vector(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _operand_map(node: fx.Node, found: Operand) -> ChannelMap | None:
    value = found.constant
    long = [axis for axis, size in enumerate(value.shape) if size != 1]
    if len(long) > 1 or not value.numel() or not bool(value.isfinite().all()):
        return None
    vector = value.double().flatten()
    ones, zeros = torch.ones_like(vector), torch.zeros_like(vector)
    affine = {
        "mul": lambda: Affine(vector, zeros),
        "div": lambda: Affine(1.0 / vector, zeros),
        "add": lambda: Affine(ones, vector),
        "sub": lambda: Affine(ones, -vector),
    }[found.kind]()
    if not bool(affine.scale.isfinite().all()):
        return None
    return ChannelMap(
        label=f"{_name(node.target)} '{node.name}'",
        data=found.data,
        affine=affine,
        axis=long[0] - value.ndim if long else None,
        scales=found.kind in ("mul", "div"),
        shifts=found.kind in ("add", "sub"),
        dtype=value.dtype if value.ndim and isinstance(found.operand, fx.Node) else None,
        rank=value.ndim,
    )


def _name(target: Callable[..., Any] | str) -> str:
    return getattr(target, "__name__", str(target))
