"""Means and variances of the values of a graph, and what dropout adds to the variances.

Li et al., "Understanding the Disharmony between Dropout and Batch Normalization by Variance
Shift", 2018, arXiv:1801.05134: behind a dropout that keeps with probability q, a unit of mean c and
variance v has the variance (c² + v)/q - c² in training and v in eval. The difference is noise of
variance (c² + v)·(1 - q)/q, which linear layers carry on to the next BatchNorm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dropsurgery.graph.affine import argument
from dropsurgery.graph.channels import traced_shape
from dropsurgery.graph.drops import drops_by_place_or_content, is_classic, is_drop, rate
from dropsurgery.graph.module import called_module
from dropsurgery.graph.ops import Kind, kind_of
from dropsurgery.graph.weighted import Weighted, read_weighted

# Points of the Gauss-Hermite rule, by which activations of a normal variable are averaged.
_POINTS = 40


@dataclass(frozen=True)
class Moments:
    """Moments of a value by channel, in float64.

    Attributes:
        mean: (C,).
        variance: (C,) with dropout off.
        noise: (C,), the variance that dropout adds in training.
    """

    mean: Tensor
    variance: Tensor
    noise: Tensor

    @property
    def ratio(self) -> Tensor:
        """The variance without dropout over that with it, (C,); NaN where nothing varies."""
        return self.variance / (self.variance + self.noise)


@dataclass(frozen=True)
class Seen:
    """What a BatchNorm sees.

    Attributes:
        node: its node.
        moments: those of its input; None where they are not known.
        dropouts: names of the dropout nodes before it, without another BatchNorm in between.
    """

    node: fx.Node
    moments: Moments | None
    dropouts: tuple[str, ...]


def call_keys(graph: fx.Graph) -> dict[fx.Node, str]:
    """Return a key for every call of a layer: its path and its turn among the calls of that path.

    Two graphs of a network name one call alike.
    """
    turns: dict[str, int] = {}
    keys = {}
    for node in graph.nodes:
        if node.op == "call_module":
            turns[str(node.target)] = turns.get(str(node.target), 0) + 1
            keys[node] = f"{node.target}#{turns[str(node.target)]}"
    return keys


def propagate(
    module: fx.GraphModule, graph: fx.Graph, measured: Mapping[str, tuple[Tensor, Tensor]]
) -> list[Seen]:
    """Carry moments through a graph, and return what each of its BatchNorms sees, in order.

    The units of a value are taken to be independent, values in front of an activation normal, and
    the network's inputs standardised, and so is a summand without noise that has no rule here.
    Whatever else has no rule has no moments behind it, until the next BatchNorm gives it some.

    Args:
        module: the traced network.
        graph: its graph.
        measured: by the key of a call, mean and variance of its *input* without the noise of
            dropout, (C,), in place of what theory makes of them; the noise is theory's.
    """
    keys = call_keys(graph)
    moments: dict[fx.Node, Moments | None] = {}
    before: dict[fx.Node, frozenset[str]] = {}
    found = []
    for node in graph.nodes:
        called = called_module(module, node)
        noises = frozenset[str]().union(*(before[value] for value in node.all_input_nodes))
        if keys.get(node) in measured:
            source = node.all_input_nodes[0]
            moments[source] = _with(measured[keys[node]], moments[source], before[source])
        if isinstance(called, _BatchNorm):
            names = tuple(n.name for n in graph.nodes if n.name in noises) if noises else ()
            found.append(Seen(node, moments[node.all_input_nodes[0]], names))
            noises = frozenset()
        elif called is not None and noise_of(called) > 0.0:
            noises = noises | {node.name}
        before[node] = noises
        if _adds(module, node):
            quiet = [value for value in node.all_input_nodes if not before[value]]
            moments[node] = _sum(module, node, moments, quiet)
        else:
            moments[node] = _moments(module, node, called, moments)
    return found


def _adds(module: fx.GraphModule, node: fx.Node) -> bool:
    return kind_of(module, node) in (Kind.ADD, Kind.SUB)


def _with(
    measured: tuple[Tensor, Tensor], theory: Moments | None, noises: frozenset[str]
) -> Moments | None:
    mean, variance = measured
    if theory is None:
        return None if noises else Moments(mean, variance, torch.zeros_like(mean))
    return Moments(mean, variance, theory.noise) if len(theory.mean) == len(mean) else theory


def _moments(
    module: fx.GraphModule,
    node: fx.Node,
    called: nn.Module | None,
    known: dict[fx.Node, Moments | None],
) -> Moments | None:
    """Return the moments of a node's output, or None."""
    operands = [known.get(value) for value in node.all_input_nodes]
    first = operands[0] if operands else None
    if isinstance(called, _BatchNorm):
        return _normalised(called, getattr(called, "act", None))
    kind = kind_of(module, node)
    if kind is Kind.CONCAT:
        return _concat(node, known)
    weighted = read_weighted(module, node, called)
    if weighted is not None:
        standard = node.all_input_nodes[0].op == "placeholder"
        shares = _shares(node, called)
        return _weighted(weighted, first, shares, standard=standard)
    if first is None:
        return None
    if called is not None and (noise := noise_of(called)) > 0.0:
        return _dropped(called, noise, first)
    if (window := _window(node, called)) is not None:
        return Moments(first.mean, first.variance, first.noise / window)
    activation = _activation(node, called)
    if activation is not None:
        mean, variance = _activated(activation, first.mean, first.variance)
        _, noisy = _activated(activation, first.mean, first.variance + first.noise)
        return Moments(mean, variance, (noisy - variance).clamp(min=0.0))
    if kind is Kind.POOL and bool(first.noise.any()):
        return None  # a maximum prefers noise that is positive
    gate = kind is Kind.PRODUCT and len(node.all_input_nodes) == 2
    if gate or kind in (Kind.ALIAS, Kind.SLICE, Kind.POOL, Kind.DROP):
        return first
    return None


def noise_of(layer: nn.Module) -> float:
    """Return the variance of the factor by which a layer multiplies in training alone: p/(1 - p).

    Monte-Carlo dropout has none: what it does in training it does in eval.
    """
    if not (is_drop(layer) or is_classic(layer)) or drops_by_place_or_content(layer):
        return 0.0
    p = rate(layer)
    return p / (1.0 - p) if p < 1.0 else math.inf


def _dropped(layer: nn.Module, noise: float, x: Moments) -> Moments:
    added = x.noise + noise * (x.mean.square() + x.variance + x.noise)
    scale = 1.0 - rate(layer) if is_classic(layer) else 1.0
    return Moments(scale * x.mean, scale**2 * x.variance, scale**2 * added)


def _normalised(norm: Any, act: nn.Module | None) -> Moments | None:
    """Return the moments behind a BatchNorm, and the activation that timm puts into it."""
    ones = torch.ones(norm.num_features, dtype=torch.float64)
    scale = ones if norm.weight is None else norm.weight.detach().cpu().double()
    shift = 0.0 * ones if norm.bias is None else norm.bias.detach().cpu().double()
    if act is None or isinstance(act, nn.Identity):
        return Moments(shift, scale.square(), 0.0 * ones)
    if not isinstance(act, _ACTIVATIONS):
        return None
    return Moments(*_activated(lambda x: act(x.clone()), shift, scale.square()), 0.0 * ones)


def _shares(node: fx.Node, called: nn.Module | None) -> Tensor | None:
    """Return for each tap of a convolution at what share of the positions it is not on padding.

    None where it pads nothing or the size of its input is not known.
    """
    conv: Any = called
    shape = traced_shape(node.all_input_nodes[0])
    if not isinstance(called, nn.Conv1d | nn.Conv2d | nn.Conv3d) or shape is None:
        return None
    if isinstance(conv.padding, str) or not any(conv.padding) or conv.padding_mode != "zeros":
        return None
    shares = torch.ones((), dtype=torch.float64)
    axes = zip(shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
    for size, kernel, stride, padding, dilation in axes:
        if size is None:
            return None
        count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        places = torch.arange(count)[:, None] * stride - padding
        places = places + torch.arange(kernel) * dilation
        inside = ((places >= 0) & (places < size)).double().mean(0)
        shares = shares[..., None] * inside
    return shares.flatten()


def _weighted(
    layer: Weighted, x: Moments | None, shares: Tensor | None, *, standard: bool
) -> Moments | None:
    w, bias, groups = layer.weight.detach().cpu().double(), layer.bias, layer.groups
    if layer.transposed:
        if groups != 1:
            return None
        w = w.transpose(0, 1)
    outputs, inputs = w.shape[:2]
    taps = w.reshape(outputs, inputs, -1)
    weights = torch.ones((), dtype=torch.float64) if shares is None else shares
    sums, squares = (taps * weights).sum(2), (taps.square() * weights).sum(2)
    if x is None and standard:
        zeros = torch.zeros(inputs * groups, dtype=torch.float64)
        x = Moments(zeros, zeros + 1.0, zeros)
    if x is None:
        return None
    copies, rest = divmod(inputs * groups, len(x.mean))
    if rest:
        return None

    def through(weights: Tensor, value: Tensor) -> Tensor:
        # Behind a flatten, a channel's positions stand side by side.
        parts = value.repeat_interleave(copies).view(groups, inputs, 1)
        return (weights.view(groups, outputs // groups, inputs) @ parts).flatten()

    mean = through(sums, x.mean)
    if bias is not None:
        mean = mean + bias.detach().cpu().double()
    return Moments(mean, through(squares, x.variance), through(squares, x.noise))


def _concat(node: fx.Node, known: dict[fx.Node, Moments | None]) -> Moments | None:
    parts = [known.get(value) for value in node.all_input_nodes]
    axis = argument(node, 1, "dim", 0)
    found = [part for part in parts if part is not None]
    if axis not in (1, -3) or len(found) < len(parts):
        return None
    values = zip(*((part.mean, part.variance, part.noise) for part in found), strict=True)
    return Moments(*(torch.cat(value) for value in values))


def _sum(
    module: fx.GraphModule,
    node: fx.Node,
    known: dict[fx.Node, Moments | None],
    quiet: list[fx.Node],
) -> Moments | None:
    """Return the moments of a sum or difference; `quiet` are the operands without noise."""
    operands = [known.get(value) for value in node.all_input_nodes]
    if len(operands) == 1 and len(node.args) == 2:
        return operands[0]  # a number is added
    found = [operand for operand in operands if operand is not None]
    if len(operands) != 2 or not found:
        return None
    if len(found) == 1:
        unknown = node.all_input_nodes[operands.index(None)]
        if unknown not in quiet:
            return None
        zeros = torch.zeros_like(found[0].mean)
        operands[operands.index(None)] = Moments(zeros, zeros + 1.0, zeros)
    left, right = operands
    if left is None or right is None or len(left.mean) != len(right.mean):
        return None
    sign = -1.0 if kind_of(module, node) is Kind.SUB else 1.0
    return Moments(
        left.mean + sign * right.mean,
        left.variance + right.variance,
        left.noise + right.noise,
    )


_POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_POOL_FUNCTIONS: dict[Any, int] = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_ADAPTIVE_FUNCTIONS = frozenset(
    {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.mean}
)


def _window(node: fx.Node, called: nn.Module | None) -> float | None:
    """Return over how many positions a pooling averages noise; None for what is no pooling."""
    axes = _POOLS.get(type(called)) if called is not None else _POOL_FUNCTIONS.get(node.target)
    if axes is not None:
        size: Any = argument(node, 1, "kernel_size") if called is None else called.kernel_size
        return float(math.prod(size) if isinstance(size, tuple) else size**axes)
    mean = node.op == "call_method" and node.target == "mean"
    if isinstance(called, _ADAPTIVE) or node.target in _ADAPTIVE_FUNCTIONS or mean:
        shapes = [traced_shape(value) for value in (node.all_input_nodes[0], node)]
        if shapes[0] is None or shapes[1] is None:
            return math.inf
        sizes = [math.prod(s or 1 for s in shape) for shape in shapes if shape is not None]
        return max(1.0, sizes[0] / max(1, sizes[1]))
    return None


_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign,
)  # fmt: skip
_FUNCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    F.relu: torch.relu, torch.relu: torch.relu, "relu": torch.relu, "relu_": torch.relu,
    F.relu6: F.relu6, F.gelu: F.gelu, F.silu: F.silu, F.hardswish: F.hardswish,
    torch.tanh: torch.tanh, "tanh": torch.tanh, torch.sigmoid: torch.sigmoid,
    "sigmoid": torch.sigmoid,
}  # fmt: skip


def _activation(node: fx.Node, called: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    if isinstance(called, _ACTIVATIONS):
        layer: Callable[[Tensor], Tensor] = called
        return lambda x: layer(x.clone())  # it may work in place
    return None if called is not None else _FUNCTIONS.get(node.target)


def _activated(
    activation: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and variance of an activation of a normal variable."""
    points, weights = _hermite()
    with torch.no_grad():
        values = activation(mean + variance.sqrt() * points[:, None])
    average = weights @ values
    return average, (weights @ values.square() - average.square()).clamp(min=0.0)


def _hermite() -> tuple[Tensor, Tensor]:
    """Return points and weights that average a function of a standard normal variable."""
    # Golub and Welsch: the eigenvalues of the recurrence's matrix.
    steps = torch.arange(1, _POINTS, dtype=torch.float64).sqrt()
    matrix = torch.diag(steps, 1) + torch.diag(steps, -1)
    points, vectors = torch.linalg.eigh(matrix)
    return points, vectors[0].square()
