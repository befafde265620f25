"""Reading the affine maps of a graph: BatchNorms with fixed statistics, and what can absorb them.

A BatchNorm in eval mode is y = s·x + t for every channel, with s = γ/√(σ² + ε) and t = β - μ·s.
A convolution or a linear layer W·x + b that comes before it absorbs it: W' = s·W over the output
channels, b' = s·b + t. Everything here reads; `dropsurgery.passes` rewrites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import batchnorm, conv, linear
from torch.nn.utils import parametrize

from dropsurgery.graph.leaves import FROZEN_BATCHNORMS
from dropsurgery.layers import FollowTraining


class Refused(Exception):
    """A reading that cannot be used; the message is the reason, as a clause of a sentence."""


@dataclass(frozen=True)
class Affine:
    """y = scale·x + shift on one axis, in float64.

    Attributes:
        scale: shape (C,).
        shift: shape (C,).
    """

    scale: Tensor
    shift: Tensor

    def then(self, after: Affine) -> Affine:
        """Return this map followed by another: s₂(s₁x + t₁) + t₂ = (s₂s₁)x + (s₂t₁ + t₂)."""
        return Affine(after.scale * self.scale, after.scale * self.shift + after.shift)


@dataclass(frozen=True)
class Norm:
    """A BatchNorm whose statistics are fixed, as it stands in a graph. Its channel axis is 1.

    Attributes:
        label: class and path, for messages.
        data: the node that it normalises.
        mean: running mean, shape (C,).
        var: running variance, shape (C,).
        weight: γ, shape (C,), or None for 1.
        bias: β, shape (C,), or None for 0.
        eps: ε.
        ranks: the ranks of input that it takes; None where it takes any from 2 on.
        tail: names of its submodules that run on the normalised value, in order.
        promotes: whether its output dtype follows from type promotion with its own tensors, where
            `F.batch_norm` returns its input's.
    """

    label: str
    data: fx.Node
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    ranks: tuple[int, ...] | None
    tail: tuple[str, ...] = ()
    promotes: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The statistics and parameters that it has."""
        return tuple(t for t in (self.mean, self.var, self.weight, self.bias) if t is not None)

    def affine(self) -> Affine:
        """Return the map, computed in float64."""
        wide = [None if t is None else t.detach().double() for t in self._fields()]
        mean, var, weight, bias = wide
        assert mean is not None
        assert var is not None
        scale = torch.rsqrt(var + self.eps) if weight is None else weight / (var + self.eps).sqrt()
        shift = -mean * scale if bias is None else bias - mean * scale
        return Affine(scale, shift)

    def _fields(self) -> tuple[Tensor | None, ...]:
        return (self.mean, self.var, self.weight, self.bias)


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

    def peaks(self) -> Tensor:
        """Return the largest |weight| of each output channel, in float64; NaN where one is NaN."""
        weight, _ = self._by_channel(self.weight.detach())
        axes = tuple(axis for axis in range(weight.ndim) if axis not in self._channel_axes())
        if not axes:  # cannot happen for torch's own layers: each has an input axis
            return weight.abs().double().flatten()
        return torch.maximum(weight.amax(axes), weight.amin(axes).neg()).double().flatten()

    def absorb(self, affine: Affine) -> tuple[Tensor, Tensor]:
        """Return weight and bias with `affine` in them.

        The arithmetic is float64, rounded once to the weight's dtype. Memory beside the result:
        one float64 copy of the weight. Dense strides (channels_last) are kept.
        """
        wide = self.weight.detach().to(torch.float64, copy=True)
        by_channel, shape = self._by_channel(wide)
        by_channel.mul_(affine.scale.view(shape))
        shift = affine.shift
        if self.bias is not None:
            shift = shift + affine.scale * self.bias.detach().double()
        return wide.to(self.weight.dtype), shift.to(self.weight.dtype)

    def _channel_axes(self) -> tuple[int, ...]:
        return (0, 2) if self.transposed else (0,)

    def _by_channel(self, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """View a weight with its output channels on axes of their own; also the shape of a scale.

        A transposed convolution's weight is (in, out/groups, …), and its groups split the input
        axis: output channel g·(out/groups) + j reads weight[in channels of group g, j].
        """
        if not self.transposed:
            return weight, (-1,) + (1,) * (weight.ndim - 1)
        split = weight.unflatten(0, (self.groups, -1))  # splitting an axis is always a view
        return split, (self.groups, 1, weight.shape[1]) + (1,) * (weight.ndim - 2)


def forward_owner(module: nn.Module) -> str:
    """Return the qualified name of the class that defines the forward which `module` runs.

    A subclass that adds nothing to a known layer is that layer; one with a forward of its own, or
    an object whose forward was replaced, is not.
    """
    if "forward" in module.__dict__:
        return "an object with a forward of its own"
    owner = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)
    return f"{owner.__module__}.{owner.__qualname__}"


def has_hooks(module: nn.Module) -> bool:
    """Say whether something runs around the module's forward, which a fold would lose."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return a call's argument, by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def fetch(module: nn.Module, target: str) -> Any:
    """Return what a `get_attr` node with this target reads."""
    path, _, name = target.rpartition(".")
    return getattr(module.get_submodule(path), name)


_BATCHNORM = "torch.nn.modules.batchnorm._BatchNorm"
_SYNC = "torch.nn.modules.batchnorm.SyncBatchNorm"
_TIMM = "timm.layers.norm_act."
# By the class that defines forward: the ranks it takes (None: the subclass's own check), and
# whether the output dtype follows from promotion.
_NORM_FORWARDS: Mapping[str, tuple[tuple[int, ...] | None, bool]] = {
    _BATCHNORM: (None, False),
    _SYNC: (None, False),
    **{name: ((4,), True) for name in FROZEN_BATCHNORMS},
    _TIMM + "BatchNormAct2d": ((4,), False),
    _TIMM + "SyncBatchNormAct": (None, False),
    _TIMM + "FrozenBatchNormAct2d": ((4,), True),
}
_INPUT_CHECKS: Mapping[Callable[..., None], tuple[int, ...]] = {
    batchnorm.BatchNorm1d._check_input_dim: (2, 3),
    batchnorm.BatchNorm2d._check_input_dim: (4,),
    batchnorm.BatchNorm3d._check_input_dim: (5,),
}
# Positions of (input, mean, var, weight, bias, training, eps).
_NORM_FUNCTIONS: Mapping[Callable[..., Any], tuple[int, ...]] = {
    F.batch_norm: (0, 1, 2, 3, 4, 5, 7),
    torch.batch_norm: (0, 3, 4, 1, 2, 5, 7),
}
_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "eps")


def norm_function(node: fx.Node, called: nn.Module | None) -> Callable[..., Any] | None:
    """Return the batch-norm function that a node calls, directly or through `FollowTraining`."""
    function = called.function if isinstance(called, FollowTraining) else node.target
    known = callable(function) and function in _NORM_FUNCTIONS
    return function if known else None


def is_norm(node: fx.Node, called: nn.Module | None) -> bool:
    """Say whether a node is a BatchNorm of any make."""
    if norm_function(node, called) is not None:
        return True
    if called is None:
        return False
    return isinstance(called, batchnorm._BatchNorm) or forward_owner(called) in _NORM_FORWARDS


def norm_ranks(module: nn.Module) -> tuple[int, ...] | None:
    """Return the ranks of input that a BatchNorm module takes; None for any from 2 on.

    Raises:
        Refused: its forward, or its check of the input, is not one that is known.
    """
    owner = forward_owner(module)
    if owner not in _NORM_FORWARDS:
        raise Refused(f"{type(module).__name__} has a forward of its own ({owner})")
    ranks, _ = _NORM_FORWARDS[owner]
    if owner == _BATCHNORM:
        check: Any = type(module)._check_input_dim
        if check not in _INPUT_CHECKS:
            raise Refused(f"{type(module).__name__} checks its input in a way of its own")
        ranks = _INPUT_CHECKS[check]
    return ranks


def read_norm(root: nn.Module, node: fx.Node, called: nn.Module | None) -> Norm:
    """Read the BatchNorm that a node calls (see `is_norm`).

    Raises:
        Refused: its statistics are not fixed, or it is not one that is known.
    """
    function = norm_function(node, called)
    if function is not None:
        norm = _read_norm_function(root, node, called, function)
    else:
        assert called is not None
        norm = _read_norm_module(node, called)
    if any(not t.is_floating_point() or t.is_meta for t in norm.tensors):
        raise Refused("its statistics are not real floating-point values")
    if any(not bool(t.isfinite().all()) for t in norm.tensors):
        raise Refused("its statistics or parameters are not finite")
    return norm


def _read_norm_module(node: fx.Node, module: nn.Module) -> Norm:
    ranks = norm_ranks(module)
    _, promotes = _NORM_FORWARDS[forward_owner(module)]
    if has_hooks(module):
        raise Refused("it has forward hooks, which would be lost")
    if parametrize.is_parametrized(module):
        raise Refused("its parameters are computed by a parametrization")
    if module.training:
        raise Refused("it is in training mode, where it uses the statistics of the batch")
    state: Any = module
    if state.running_mean is None or state.running_var is None:
        raise Refused("it has no running statistics (track_running_stats=False)")
    data = _only_input(node)
    tail = tuple(
        name
        for name in ("drop", "act")
        if ".norm_act." in forward_owner(module)
        and not isinstance(getattr(module, name, None), nn.Identity | None)
    )
    return Norm(
        label=f"{type(module).__name__} '{node.target}'",
        data=data,
        mean=state.running_mean,
        var=state.running_var,
        weight=state.weight,
        bias=state.bias,
        eps=float(state.eps),
        ranks=ranks,
        tail=tail,
        promotes=promotes,
    )


def _read_norm_function(
    root: nn.Module, node: fx.Node, called: nn.Module | None, function: Callable[..., Any]
) -> Norm:
    positions = zip(_NORM_FUNCTIONS[function], _NORM_ARGUMENTS, strict=True)
    data, mean, var, weight, bias, training, eps = (
        argument(node, position, name) for position, name in positions
    )
    if called is not None:
        training = called.training
    if training not in (None, False):
        raise Refused("it is in training mode, where it uses the statistics of the batch")
    if mean is None or var is None:
        raise Refused("it has no running statistics")
    eps = 1e-5 if eps is None else eps
    if not isinstance(data, fx.Node) or not isinstance(eps, float | int):
        raise Refused("its arguments are computed by the network")
    mean, var, weight, bias = (
        None if operand is None else stored_tensor(root, operand)[1]
        for operand in (mean, var, weight, bias)
    )
    return Norm(f"batch_norm '{node.name}'", data, mean, var, weight, bias, float(eps), None)


def stored_tensor(root: nn.Module, operand: Any) -> tuple[fx.Node, Tensor]:
    """Return the `get_attr` node and the parameter or buffer that an operand is.

    Raises:
        Refused: the operand is computed.
    """
    if isinstance(operand, fx.Node) and operand.op == "get_attr":
        value = fetch(root, str(operand.target))
        if isinstance(value, Tensor):
            return operand, value
    raise Refused(f"its operand {operand} is computed by the network, not a parameter or buffer")


def _only_input(node: fx.Node) -> fx.Node:
    values = [*node.args, *node.kwargs.values()]
    if len(values) == 1 and isinstance(values[0], fx.Node):
        return values[0]
    raise Refused("it is called with more than its input")


_LINEAR = linear.Linear
_CONVS: Mapping[type[nn.Module], int] = {
    conv.Conv1d: 1,
    conv.Conv2d: 2,
    conv.Conv3d: 3,
    conv.ConvTranspose1d: 1,
    conv.ConvTranspose2d: 2,
    conv.ConvTranspose3d: 3,
}
# Subclasses whose forward pads the input, or is torch's own written out again.
_SAME_FORWARDS = frozenset(
    {"timm.layers.conv2d_same.Conv2dSame", "timm.layers.linear.Linear"}
    | {f"{cls.__module__}.{cls.__qualname__}" for cls in (_LINEAR, *_CONVS)}
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
    if len(dtypes) > 1 or dtypes.isdisjoint(_DTYPES):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise Refused(f"{found.label} has parameters of {names}")
    if any(t.is_meta or not t.numel() for t in found.tensors):
        raise Refused(f"{found.label} has parameters without values")
    return found


_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _read_weighted_module(node: fx.Node, module: nn.Module) -> Weighted | None:
    axes = conv_axes(module)
    if axes is None and not isinstance(module, _LINEAR):
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
    known = (conv.Conv1d, conv.Conv2d, conv.Conv3d)
    own: Any = getattr(type(module), "_conv_forward", None)
    return own is not None and own not in {cls._conv_forward for cls in known}


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
    axes, transposed = known
    groups = 1 if axes is None else argument(node, 6, "groups", 1)
    if not isinstance(groups, int):
        raise Refused(f"the groups of {label} are computed by the network")
    return Weighted(
        label, weight, bias, axes, groups, transposed, operands=(weight_node, bias_node)
    )


_DROPOUT_FUNCTIONS = {
    function
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")
    for function in (getattr(F, name),)
} | {F.feature_alpha_dropout}
_DROP_FORWARDS = frozenset(
    {
        "timm.layers.drop.DropPath",
        "timm.layers.drop.DropBlock2d",
        "torchvision.ops.stochastic_depth.StochasticDepth",
        "torchvision.ops.drop_block.DropBlock2d",
        "torchvision.ops.drop_block.DropBlock3d",
        "dropsurgery.layers.drop_path.DropPath",
        "dropsurgery.layers.dropout.GaussianDropout",
    }
)


def identity_input(node: fx.Node, called: nn.Module | None) -> fx.Node | None:
    """Return the input of a node that returns it as it is: `nn.Identity`, a drop layer in eval.

    A drop layer in training mode, or one that is always on, is not the identity: None.
    """
    data = argument(node, 0, "input", node.kwargs.get("x"))
    if not isinstance(data, fx.Node):
        return None
    if called is None:
        off = node.target in _DROPOUT_FUNCTIONS and argument(node, 2, "training", True) is False
        return data if off and node.op == "call_function" else None
    if has_hooks(called):
        return None
    owner = forward_owner(called)
    if isinstance(called, FollowTraining):
        passes = called.function in _DROPOUT_FUNCTIONS and not called.training
    elif owner in _DROP_FORWARDS or owner.startswith("torch.nn.modules.dropout."):
        passes = not called.training
    else:
        passes = owner == "torch.nn.modules.linear.Identity"
    return data if passes else None


def loses_precision(weighted: Weighted, affine: Affine) -> str | None:
    """Return why the folded parameters cannot be held in the weight's dtype, or None.

    Overflow: a folded value is not finite. Underflow: even the largest folded weight is below the
    smallest normal number, so that all of them lose digits. (Where only some channels are that
    small, what they lose is at most half a unit in the last place of the layer's largest weight.)
    """
    dtype = weighted.weight.dtype
    peaks = affine.scale.abs() * weighted.peaks()
    shift = affine.shift
    if weighted.bias is not None:
        shift = shift + affine.scale * weighted.bias.detach().double()
    if not bool(torch.cat((peaks, shift)).to(dtype).isfinite().all()):
        return f"the folded weights are not finite in {dtype}"
    largest = float(peaks.max())
    if 0.0 < largest < torch.finfo(dtype).tiny or math.isnan(largest):
        return f"the folded weights are too small for {dtype} (largest {largest:.2g})"
    return None
