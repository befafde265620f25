"""What a network stores beside its layers, and what takes affine maps in like a layer.

- a tensor that a graph reads (a position table, a class token, a gain for every entry) and the
  table of an embedding: s·w + t, entry by entry, is another tensor of the same kind;
- a matrix that values are multiplied with: (s·(x·s₀ + t₀)·W) + t = x·(s₀·W·s) + (s·(t₀·W) + t),
  a linear layer whose weight lies the other way round; `addmm` has its bias, too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from dropsurgery.graph.affine import Affine, Refused, argument
from dropsurgery.graph.leaves import forward_owner, has_hooks
from dropsurgery.graph.uses import Uses
from dropsurgery.graph.weighted import BLOCK, FLOATS, Weighted

_EMBEDDING, _BAG = (f"torch.nn.modules.sparse.{name}" for name in ("Embedding", "EmbeddingBag"))
PRODUCTS = frozenset({torch.matmul, torch.mm, operator.matmul, "matmul", "mm"})


@dataclass(frozen=True)
class Table(Weighted):
    """A stored tensor; its `weight` is itself, and it has no bias.

    Attributes:
        axis: the axis that holds the channels, from the front; None where it is not settled yet,
            and one number goes for all entries.
        scale_only: why it takes no shift; empty where it does.
        positive: whether it takes no negative scale.
    """

    axis: int | None = None
    scale_only: str = ""
    positive: bool = False

    @property
    def channels(self) -> int:
        """Number of entries on the channels' axis."""
        return 1 if self.axis is None else self.weight.shape[self.axis]

    def taken(self, affine: Affine) -> Tensor:
        """Return the tensor with s·w + t in place of w: in float64 by blocks, rounded once."""
        result = torch.empty_like(self.weight, requires_grad=False)
        target, source = (torch.atleast_1d(t) for t in (result, self.weight.detach()))
        scale, shift = (
            self._spread(values, source.ndim) for values in (affine.scale, affine.shift)
        )
        rows = max(1, BLOCK // max(1, source[0].numel()))
        for start in range(0, len(source), rows):
            part = slice(start, start + rows)
            along = part if self.axis == 0 else slice(None)
            target[part] = (source[part].double() * scale[along]).add_(shift[along])
        return result

    def lost(self, affine: Affine) -> str | None:
        """Return why the dtype cannot hold s·w + t, or None."""
        weight, dtype = self.weight.detach(), self.weight.dtype
        others = tuple(axis for axis in range(weight.ndim) if axis != self.axis)
        ends = [weight, weight]
        if others or self.axis is None:
            ends = [weight.amax(others), weight.amin(others)]
        reached = [end.double().reshape(-1) * affine.scale + affine.shift for end in ends]
        values = torch.cat(reached)
        if not bool(values.to(dtype).isfinite().all()):
            return f"the values would not be finite in {dtype}"
        largest = float(values.abs().max())
        if 0.0 < largest < torch.finfo(dtype).tiny or math.isnan(largest):
            return f"the values would be too small for {dtype} (largest {largest:.2g})"
        return None

    def _spread(self, values: Tensor, rank: int) -> Tensor:
        """View a vector so that it broadcasts with the tensor."""
        shape = [1] * rank
        if self.axis is None:
            return values.reshape(shape)
        shape[self.axis] = self.channels
        return values.expand(self.channels).reshape(shape)


@dataclass(frozen=True)
class Product(Weighted):
    """A product x·W with a stored matrix W of shape (inputs, outputs), which has no bias."""


def read_stored(root: nn.Module, node: fx.Node, called: nn.Module | None) -> Weighted | None:
    """Read a stored tensor, an embedding, or a product with a stored matrix; None for others.

    Raises:
        Refused: its values are not simply a parameter or buffer.
    """
    if node.op == "get_attr":
        return _read_tensor(root, node)
    if node.op == "call_module":
        return _read_embedding(node, called)
    if node.target is torch.addmm:
        return _read_addmm(root, node)
    if node.target not in PRODUCTS or len(node.args) + len(node.kwargs) != 2:
        return None
    left = argument(node, 0, "input")
    right = argument(node, 1, "other", node.kwargs.get("mat2"))
    stored = (isinstance(v, fx.Node) and v.op == "get_attr" for v in (left, right))
    if not isinstance(left, fx.Node) or tuple(stored) != (False, True):
        return None
    weight = _values(root, right)
    if weight.ndim != 2:
        return None
    label = f"{getattr(node.target, '__name__', node.target)} '{node.name}'"
    return Product(label, weight, None, None, transposed=True, operands=(right, None))


def _read_addmm(root: nn.Module, node: fx.Node) -> Weighted | None:
    """Read b + x·W, where all of W and b is stored."""
    bias, data, weight = (
        argument(node, index, name) for index, name in enumerate(("input", "mat1", "mat2"))
    )
    stored = (isinstance(v, fx.Node) and v.op == "get_attr" for v in (bias, data, weight))
    if tuple(stored) != (True, False, True) or not set(node.kwargs) <= {"input", "mat1", "mat2"}:
        return None
    tensors = _values(root, weight), _values(root, bias)
    if tensors[1].shape != tensors[0].shape[1:] or tensors[0].dtype != tensors[1].dtype:
        return None
    return Weighted(
        f"addmm '{node.name}'", *tensors, None, transposed=True, operands=(weight, bias)
    )


def _read_tensor(root: nn.Module, node: fx.Node) -> Table:
    return Table(f"parameter '{node.target}'", _values(root, node), None, None)


def _values(root: nn.Module, node: fx.Node) -> Tensor:
    """Return the parameter or buffer that a node reads."""
    prefix, _, name = str(node.target).rpartition(".")
    owner = root.get_submodule(prefix)
    value = owner._parameters.get(name, owner._buffers.get(name))
    if value is None:
        raise Refused(f"'{node.target}' is neither a parameter nor a buffer")
    return _usable(value, f"'{node.target}'")


def _usable(value: Any, label: str) -> Tensor:
    if type(value) not in (nn.Parameter, Tensor) or value.dtype not in FLOATS:
        raise Refused(f"{label} does not hold floating-point values")
    if value.is_meta or not value.numel():
        raise Refused(f"{label} has no values")
    found: Tensor = value
    return found


def _read_embedding(node: fx.Node, called: Any) -> Table | None:
    """Rows of a table, as they are or (a bag) summed, averaged or the largest of them.

    A bag may be empty, and then is zero, so that it takes a scale only: Σ s·wᵢ = s·Σ wᵢ.
    """
    if not isinstance(called, nn.Embedding | nn.EmbeddingBag):
        return None
    label, owner = f"{type(called).__name__} '{node.target}'", forward_owner(called)
    if owner not in (_EMBEDDING, _BAG) or has_hooks(called) or parametrize.is_parametrized(called):
        raise Refused(f"{label} has a forward of its own")
    if called.max_norm is not None:
        raise Refused(f"{label} has max_norm, which changes its rows as they are read")
    weight = _usable(called.weight, f"the table of {label}")
    bag = isinstance(called, nn.EmbeddingBag)
    why = f"{label} sums the rows of bags, which may be empty" if bag else ""
    positive = bag and called.mode == "max"
    return Table(
        label, weight, None, None, module=called, axis=1, scale_only=why, positive=positive
    )


def check_own(uses: Uses, modules: Mapping[str, nn.Module], node: fx.Node, table: Table) -> None:
    """Raise Refused where something beside `node` and what reads it needs the stored values.

    A copy would keep both exact, and cost memory: a table is large, and what it saves is small.
    """
    module = table.module
    own = () if module is not None else tuple(node.users)
    others = [reader.name for reader in uses.readers(table.weight) if reader not in own]
    for path in uses.holders(table.weight):
        if modules[path] is not module and uses.is_run(modules[path]):
            others.append(f"the module '{path}'")
    owner = modules[str(node.target).rpartition(".")[0]]
    if module is None and uses.is_run(owner):
        others.append(f"the module '{str(node.target).rpartition('.')[0]}'")
    if others:
        names = ", ".join(dict.fromkeys(others))
        raise Refused(f"{table.label} is also read by {names}")
