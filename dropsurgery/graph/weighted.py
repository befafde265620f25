"""Layers W·x + b that can absorb an affine map of their output channels.

With y = s·x + t behind it, W becomes s·W over the output channels and b becomes s·b + t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import conv
from torch.nn.utils import parametrize

from dropsurgery.graph.affine import Affine, Refused, argument, stored_tensor
from dropsurgery.graph.leaves import forward_owner, has_hooks
from dropsurgery.graph.rounding import round_rows

# What torch computes convolutions in; anything else (quantised, complex) is left alone.
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
# Entries that are multiplied at a time: 2 MiB in float64.
BLOCK = 2**18


@dataclass(frozen=True)
class Weighted:
    """A convolution, transposed convolution or linear layer, as it stands in a graph.

    Attributes:
        label: class and path, for messages.
        weight: its weight, output channels first (transposed: on axis 1, group by group).
        bias: its bias, shape (C,), or None.
        spatial: number of spatial axes, or None for a linear layer.
        groups: groups of a convolution.
        transposed: whether it is a transposed convolution.
        module: the module that holds both, or None where they are operands of a function.
        operands: for a function, the `get_attr` nodes of weight and bias.
    """

    label: str
    weight: Tensor
    bias: Tensor | None
    spatial: int | None
    groups: int = 1
    transposed: bool = False
    module: nn.Module | None = None
    operands: tuple[fx.Node | None, fx.Node | None] = (None, None)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Weight, and bias if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    def peaks(self, before: Affine | None = None) -> Tensor:
        """Return the largest |weight| of each output channel, in float64; NaN where one is NaN.

        Args:
            before: a map of the input channels that the weight takes in first.
        """
        weight = self._view(self.weight.detach())
        axes = tuple(range(2, weight.ndim))
        if before is None:
            return torch.maximum(weight.amax(axes), weight.amin(axes).neg()).double().flatten()
        peaks = weight.new_empty(weight.shape[:2], dtype=torch.float64)
        for old, top, inner in self._blocks(weight, peaks, self._inner(before.scale, weight)):
            top.copy_((old.double() * inner).abs_().amax(axes))
        return peaks.flatten()

    def absorb(self, affine: Affine, before: Affine | None = None) -> tuple[Tensor, Tensor]:
        """Return weight and bias with the map `affine` of the output in them.

        With a map s₀x + t₀ `before` the layer, s(W(s₀x + t₀) + b) + t: the weight is s·W·s₀ and
        the bias s(b + W·t₀) + t.

        The arithmetic is float64, rounded once to the weight's dtype (see `round_rows` for half
        precision), and goes by blocks, so that it takes little memory beside the result. Dense
        strides (channels_last) are kept.
        """
        weight = torch.empty_like(self.weight, requires_grad=False)
        target, source = self._view(weight), self._view(self.weight.detach())
        shape = (*source.shape[:2],) + (1,) * (source.ndim - 2)
        outer = affine.scale.expand(self.channels).reshape(shape)
        if before is None:
            for new, old, factor in self._blocks(target, source, outer):
                new.copy_(_rounded(old.double() * factor, weight.dtype))
        else:
            parts = (target, source, outer, self._inner(before.scale, source))
            for new, old, factor, inner in self._blocks(*parts):
                new.copy_(_rounded((old.double() * inner).mul_(factor), weight.dtype))
        return weight, self.shifted(affine, before).to(weight.dtype)

    def shifted(self, affine: Affine, before: Affine | None = None) -> Tensor:
        """Return the bias with `affine` in it (and a map `before` the layer), in float64."""
        bias = None if self.bias is None else self.bias.detach().double()
        if before is not None and bool(before.shift.any()):
            source = self._view(self.weight.detach())
            sums = source.new_empty(source.shape[:2], dtype=torch.float64)
            parts = (source, sums, self._inner(before.shift, source))
            for old, total, inner in self._blocks(*parts):
                total.copy_((old.double() * inner).flatten(2).sum(-1))
            bias = sums.flatten() if bias is None else bias + sums.flatten()
        if bias is None:
            return affine.shift.expand(self.channels)
        return affine.shift + affine.scale * bias

    def _view(self, weight: Tensor) -> Tensor:
        """View a weight as (groups, out/groups, in/groups, …).

        A transposed convolution's weight is (in, out/groups, …), and its groups split the input
        axis: output channel g·(out/groups) + j reads weight[in channels of group g, j].
        """
        if weight.ndim == 1:  # of a normalisation: one factor a channel
            return weight.view(1, -1, 1)
        split = weight.unflatten(0, (self.groups, -1))  # splitting an axis is always a view
        return split.transpose(1, 2) if self.transposed else split

    def _inner(self, values: Tensor, weight: Tensor) -> Tensor:
        """View values of the input channels so that they broadcast with `_view(weight)`."""
        shape = (weight.shape[0], 1, weight.shape[2]) + (1,) * (weight.ndim - 3)
        return values.expand(self.inputs).reshape(shape)

    def _blocks(self, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield small pieces of tensors whose leading axes are (groups, out/groups or 1)."""
        groups, rows = parts[0].shape[:2]
        size = max(1, parts[0][0, 0].numel())  # of one row
        some_groups, some_rows = max(1, BLOCK // (rows * size)), max(1, BLOCK // size)
        for group in range(0, groups, some_groups):
            chosen = [part[group : group + some_groups] for part in parts]
            for row in range(0, rows, some_rows):
                yield tuple(
                    part if part.shape[1] != rows else part[:, row : row + some_rows]
                    for part in chosen
                )


def _rounded(block: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a block (groups, out/groups, in/groups, …) of a weight, a row for each output."""
    return round_rows(block.flatten(0, 1), dtype).view(block.shape)


_CONVS: Mapping[type[nn.Module], int] = {
    conv.Conv1d: 1,
    conv.Conv2d: 2,
    conv.Conv3d: 3,
    conv.ConvTranspose1d: 1,
    conv.ConvTranspose2d: 2,
    conv.ConvTranspose3d: 3,
}
_CLASSES: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVS)
# Subclasses whose forward pads the input, or is torch's own written out again.
_SAME_FORWARDS = frozenset(
    {"timm.layers.conv2d_same.Conv2dSame", "timm.layers.linear.Linear"}
    | {f"{cls.__module__}.{cls.__name__}" for cls in _CLASSES}
)
# Spatial axes (None: linear) and whether transposed; groups are argument 6 of all.
_WEIGHTED_FUNCTIONS: Mapping[Callable[..., Any], tuple[int | None, bool]] = {
    F.linear: (None, False),
    F.conv1d: (1, False),
    F.conv2d: (2, False),
    F.conv3d: (3, False),
    F.conv_transpose1d: (1, True),
    F.conv_transpose2d: (2, True),
    F.conv_transpose3d: (3, True),
}


def conv_axes(module: nn.Module) -> int | None:
    """Return the number of spatial axes of a convolution; None for any other module."""
    return next((axes for cls, axes in _CONVS.items() if isinstance(module, cls)), None)


def conv_function(function: Any) -> tuple[int | None, bool] | None:
    """Return (spatial axes, transposed) of `F.conv*` and `F.linear`; None for another function."""
    return _WEIGHTED_FUNCTIONS.get(function) if callable(function) else None


def read_weighted(root: nn.Module, node: fx.Node, called: nn.Module | None) -> Weighted | None:
    """Read the convolution or linear layer that a node calls; None where it calls neither.

    Raises:
        Refused: it is one, but its weights are not simply its parameters.
    """
    if called is not None:
        found = _read_weighted_module(node, called)
    elif node.op == "call_function":
        found = _read_weighted_function(root, node)
    else:
        return None
    if found is None:
        return None
    dtypes = {t.dtype for t in found.tensors}
    if len(dtypes) > 1 or dtypes.isdisjoint(FLOATS):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise Refused(f"{found.label} has parameters of {names}")
    if found.weight.ndim != (found.spatial or 0) + 2:
        raise Refused(f"{found.label} has a weight of rank {found.weight.ndim}")
    if any(t.is_meta or not t.numel() for t in found.tensors):
        raise Refused(f"{found.label} has parameters without values")
    return found


def _read_weighted_module(node: fx.Node, module: nn.Module) -> Weighted | None:
    axes = conv_axes(module)
    if axes is None and not isinstance(module, nn.Linear):
        return None
    label = f"{type(module).__name__} '{node.target}'"
    if parametrize.is_parametrized(module):
        raise Refused(
            f"the weight of {label} is computed by a parametrization: "
            "torch.nn.utils.parametrize.remove_parametrizations makes it a parameter"
        )
    if has_hooks(module):
        raise Refused(f"{label} has forward hooks, which may compute its weight")
    owner = forward_owner(module)
    if owner not in _SAME_FORWARDS or _has_own_conv_forward(module):
        raise Refused(f"{label} has a forward of its own ({owner})")
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if type(weight) is not nn.Parameter or (bias is not None and type(bias) is not nn.Parameter):
        raise Refused(f"the weight or bias of {label} is not a plain parameter")
    state: Any = module
    if axes is None:
        return Weighted(label, weight, bias, None, module=module)
    return Weighted(label, weight, bias, axes, state.groups, state.transposed, module)


def _has_own_conv_forward(module: nn.Module) -> bool:
    """Torch's forward of a convolution calls a second method, which a subclass may replace."""
    base = next((cls for cls in _CONVS if isinstance(module, cls)), None)
    return base is not None and _conv_forward(type(module)) is not _conv_forward(base)


def _conv_forward(cls: type[nn.Module]) -> Any:
    return getattr(cls, "_conv_forward", None)


def _read_weighted_function(root: nn.Module, node: fx.Node) -> Weighted | None:
    known = conv_function(node.target)
    if known is None:
        return None
    label = f"{getattr(node.target, '__name__', node.target)} '{node.name}'"
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    try:
        weight_node, weight = stored_tensor(root, weight)
        bias_node, bias = (None, None) if bias is None else stored_tensor(root, bias)
    except Refused as refused:
        raise Refused(f"{label}: {refused}") from None
    if argument(node, 0, "input") in (weight_node, bias_node):
        raise Refused(f"the weight or bias of {label} is its input, too")
    axes, transposed = known
    groups = 1 if axes is None else argument(node, 6, "groups", 1)
    if not isinstance(groups, int):
        raise Refused(f"the groups of {label} are computed by the network")
    return Weighted(
        label, weight, bias, axes, groups, transposed, operands=(weight_node, bias_node)
    )


def loses_precision(weighted: Weighted, affine: Affine, before: Affine | None = None) -> str | None:
    """Return why the folded parameters cannot be held in the weight's dtype, or None.

    Overflow: a folded value is not finite. Underflow: even the largest folded weight is below the
    smallest normal number, so that all of them lose digits. (Where only some channels are that
    small, what they lose is at most half a unit in the last place of the layer's largest weight.)
    """
    dtype = weighted.weight.dtype
    peaks = affine.scale.abs() * weighted.peaks(before)
    values = torch.cat((peaks, weighted.shifted(affine, before)))
    if not bool(values.to(dtype).isfinite().all()):
        return f"the folded weights are not finite in {dtype}"
    largest = float(peaks.max())
    if 0.0 < largest < torch.finfo(dtype).tiny or math.isnan(largest):
        return f"the folded weights are too small for {dtype} (largest {largest:.2g})"
    return None
