"""Reading the affine maps of a graph: BatchNorms with fixed statistics.

In eval mode a BatchNorm is y = s·x + t for every channel, with s = weight/√(var + eps) and
t = bias - mean·s. Everything here reads; `dropsurgery.passes` rewrites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import batchnorm
from torch.nn.utils import parametrize

from dropsurgery.graph.leaves import (
    DROP_BLOCKS,
    DROP_PATHS,
    FROZEN_BATCHNORMS,
    OWN_DROPS,
    forward_owner,
    has_hooks,
)
from dropsurgery.graph.module import called_module
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
        weight: its factor, shape (C,), or None for 1.
        bias: its summand, shape (C,), or None for 0.
        eps: what is added to the variance.
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
        scale = (self.var.detach().double() + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.detach().double()
        shift = -self.mean.detach().double() * scale
        if self.bias is not None:
            shift = shift + self.bias.detach().double()
        return Affine(scale, shift)


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
    **dict.fromkeys(FROZEN_BATCHNORMS, ((4,), True)),
    _TIMM + "BatchNormAct2d": ((4,), False),
    _TIMM + "SyncBatchNormAct": (None, False),
    _TIMM + "FrozenBatchNormAct2d": ((4,), True),
}
_INPUT_CHECKS: Mapping[Any, tuple[int, ...]] = {
    batchnorm.BatchNorm1d._check_input_dim: (2, 3),
    batchnorm.BatchNorm2d._check_input_dim: (4,),
    batchnorm.BatchNorm3d._check_input_dim: (5,),
}
# By rank of the input: the layer that computes what `F.batch_norm` does.
NORM_LAYERS: Mapping[int | None, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
# Positions of (input, mean, var, weight, bias, training, eps).
_NORM_FUNCTIONS: Mapping[Callable[..., Any], tuple[int, ...]] = {
    F.batch_norm: (0, 1, 2, 3, 4, 5, 7),
    torch.batch_norm: (0, 3, 4, 1, 2, 5, 7),
}
_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "eps")


def norm_function(node: fx.Node, called: nn.Module | None) -> Callable[..., Any] | None:
    """Return the batch-norm function that a node calls, directly or through `FollowTraining`."""
    function: Any = called.function if isinstance(called, FollowTraining) else node.target
    return function if function in _NORM_FUNCTIONS else None


def is_norm(node: fx.Node, called: nn.Module | None) -> bool:
    """Say whether a node is a BatchNorm of any make."""
    if norm_function(node, called) is not None:
        return True
    if called is None:
        return False
    return isinstance(called, batchnorm._BatchNorm) or forward_owner(called) in _NORM_FORWARDS


def norm_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes of a graph that are BatchNorms."""
    return [node for node in module.graph.nodes if is_norm(node, called_module(module, node))]


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
        check = getattr(type(module), "_check_input_dim", None)
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
        raise Refused("it is in training mode: call .eval() first")
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
    if called is not None and called.training:
        raise Refused("it is in training mode: call .eval() first")
    if called is None and training not in (None, False):
        raise Refused("it always uses the statistics of the batch (training=True)")
    if mean is None or var is None:
        raise Refused("it has no running statistics")
    eps = 1e-5 if eps is None else eps
    if not isinstance(data, fx.Node) or not isinstance(eps, float | int):
        raise Refused("its arguments are computed by the network")
    return Norm(
        label=f"batch_norm '{node.name}'",
        data=data,
        mean=stored_tensor(root, mean)[1],
        var=stored_tensor(root, var)[1],
        weight=None if weight is None else stored_tensor(root, weight)[1],
        bias=None if bias is None else stored_tensor(root, bias)[1],
        eps=float(eps),
        ranks=None,
    )


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


_DROPOUT_FUNCTIONS = frozenset(
    {
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
    }
)
_DROP_FORWARDS = DROP_PATHS | DROP_BLOCKS | OWN_DROPS


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
