"""Which noise stands in for another, and which weights take the factor that this costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from dropsurgery.graph.affine import Refused, argument
from dropsurgery.graph.drops import (
    drops_by_place_or_content,
    is_classic,
    is_drop_block,
    is_drop_path,
    is_patch_dropout,
    rate,
)
from dropsurgery.graph.module import called_module
from dropsurgery.graph.ops import Kind, kind_of
from dropsurgery.graph.uses import Uses, value_readers
from dropsurgery.graph.weighted import read_weighted
from dropsurgery.layers.attention import GaussianMultiheadAttention, ScaledDotProductAttention
from dropsurgery.layers.classic_dropout import ClassicDropout
from dropsurgery.layers.drop_path import DropPath
from dropsurgery.layers.dropout import GaussianDropout
from dropsurgery.layers.monte_carlo import (
    MonteCarloAttention,
    MonteCarloDropout,
    MonteCarloMultiheadAttention,
    Noise,
)
from dropsurgery.layers.noise import Units
from dropsurgery.layers.uniform_dropout import UniformDropout

_CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
_BY_RANK: dict[int, type[nn.Module]] = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}
# Noise with a mean of 1 that is no Bernoulli mask.
_SMOOTH = (GaussianDropout, UniformDropout)


@dataclass(frozen=True)
class Target:
    """What a drop is to become: a form, and its parameters.

    Attributes:
        form: "gaussian", "uniform", "classic", "inverted" or "monte-carlo".
        beta: the width of uniform noise; None for the one that matches the variance.
        noise: the distribution of Monte-Carlo noise.
    """

    form: str
    beta: float | None = None
    noise: Noise = "bernoulli"


def units_of(layer: nn.Module) -> Units:
    """Return which units of a drop layer's input share a draw."""
    if is_drop_path(layer):
        mode = getattr(layer, "mode", "row")
        units: Any = mode if mode == "batch" else "row"  # "subset" drops rows, too
    elif isinstance(layer, _CHANNEL_DROPOUTS):
        units = "channel"
    else:
        units = getattr(layer, "units", "element")
    return units


def stand_in(layer: nn.Module, target: Target, rank: Callable[[], int | None]) -> nn.Module | None:
    """Return the layer that stands in for a drop layer; None where it has that form already.

    Args:
        layer: a drop layer, `ClassicDropout`, `MonteCarloDropout` or `ScaledDotProductAttention`.
        target: what it is to become.
        rank: asks for the rank of its input, None where it is not known.

    Raises:
        Refused: there is no such layer.
    """
    if isinstance(layer, ScaledDotProductAttention):
        return _attention(layer, target)
    if drops_by_place_or_content(layer):
        regions = is_drop_block(layer) or is_patch_dropout(layer)
        what = "it drops regions" if regions else "what it drops depends on place or content"
        raise Refused(f"{what}, which has no {_NAMES[target.form]} form")
    p, units = rate(layer), units_of(layer)
    if p == 1.0:
        raise Refused("its variance is infinite at p = 1")
    generator = getattr(layer, "generator", None)
    if getattr(layer, "per_sample", False):
        raise Refused("it draws a weight for each sample")
    if is_classic(layer) and target.form not in ("classic", "inverted"):
        raise Refused("it scales in eval: convert it to 'inverted' first")
    if target.form == "gaussian":
        same = isinstance(layer, GaussianDropout)
        return None if same else GaussianDropout(p, units, generator=generator)
    if target.form == "uniform":
        if target.beta is not None:
            return UniformDropout(target.beta, units, generator=generator)
        same = isinstance(layer, UniformDropout)
        return None if same else UniformDropout.matching(p, units, generator=generator)
    if isinstance(layer, nn.AlphaDropout | nn.FeatureAlphaDropout):
        raise Refused("alpha dropout also adds, which a mask does not")
    if target.form == "monte-carlo":
        return MonteCarloDropout(p, target.noise, units)
    if target.form == "inverted":
        return _inverted(layer, p, units, rank)
    if is_classic(layer):
        return None
    if isinstance(layer, (*_SMOOTH, MonteCarloDropout)):
        raise Refused("its noise is no mask: convert it to 'inverted' first")
    return ClassicDropout(p, units, generator=generator)


_NAMES = {
    "gaussian": "Gaussian", "uniform": "uniform", "classic": "classic", "inverted": "inverted",
    "monte-carlo": "Monte-Carlo",
}  # fmt: skip


def _inverted(
    layer: nn.Module, p: float, units: Units, rank: Callable[[], int | None]
) -> nn.Module | None:
    """Return the Bernoulli layer with inverted scaling; None where the layer is one."""
    if not (is_classic(layer) or isinstance(layer, (*_SMOOTH, MonteCarloDropout))):
        return None
    if units == "element":
        return nn.Dropout(p)
    if units != "channel":
        return DropPath(p, units)
    axes = rank()
    if axes not in _BY_RANK:
        raise Refused("the rank of its input is not known: give example_inputs")
    return _BY_RANK[axes](p)


def _attention(layer: ScaledDotProductAttention, target: Target) -> nn.Module | None:
    p = layer.dropout_p
    if p == 1.0:
        raise Refused("its variance is infinite at p = 1")
    if target.form == "monte-carlo":
        return MonteCarloAttention(p, target.noise)
    always = isinstance(layer, MonteCarloAttention)
    if target.form == "gaussian":
        same = not always and layer.noise == "gaussian"
        return None if same else ScaledDotProductAttention(p, "gaussian")
    if target.form == "inverted":
        same = not always and layer.noise == "bernoulli"
        return None if same else ScaledDotProductAttention(p)
    raise Refused(f"attention weights have no {_NAMES[target.form]} form here")


def attention_class(
    layer: nn.MultiheadAttention, target: Target
) -> type[nn.MultiheadAttention] | None:
    """Return the class that gives a `MultiheadAttention` a form; None where it has it already.

    Raises:
        Refused: there is no such class.
    """
    known = (nn.MultiheadAttention, GaussianMultiheadAttention, MonteCarloMultiheadAttention)
    if layer.dropout == 1.0:
        raise Refused("its variance is infinite at p = 1")
    if type(layer) not in known:
        raise Refused(f"{type(layer).__name__} is a subclass with its own forward")
    if target.form not in ("gaussian", "inverted", "monte-carlo"):
        raise Refused(f"attention weights have no {_NAMES[target.form]} form here")
    cls = {"inverted": known[0], "gaussian": known[1], "monte-carlo": known[2]}[target.form]
    return None if type(layer) is cls and target.form != "monte-carlo" else cls


# f(a·x) = a·f(x) for a > 0.
_HOMOGENEOUS_LAYERS = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_HOMOGENEOUS = frozenset(
    {F.relu, torch.relu, F.leaky_relu, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
     F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.mean, torch.sum}
)  # fmt: skip
_HOMOGENEOUS_METHODS = frozenset({"relu", "mean", "sum"})


def takers(module: fx.GraphModule, node: fx.Node, uses: Uses) -> tuple[str, ...]:
    """Return the paths of the layers whose weights can take a factor of a node's output.

    Raises:
        Refused: something else sees the factor, or a layer cannot take it.
    """
    found: dict[str, None] = {}
    waiting, seen = [node], {node}
    while waiting:
        value = waiting.pop()
        for user in value_readers(value):
            called = called_module(module, user)
            weighted = read_weighted(module, user, called) if user.op == "call_module" else None
            if weighted is not None and argument(user, 0, "input") is value:
                _check_taker(user, called, uses)
                found[str(user.target)] = None
            elif _passes_factors(module, user, called):
                waiting += [user] if user not in seen else []
                seen.add(user)
            else:
                raise Refused(f"'{user.name}' sees its eval factor, and has no weight to take it")
    if not found:
        raise Refused("no layer behind it takes its eval factor")
    return tuple(found)


def _check_taker(user: fx.Node, called: nn.Module | None, uses: Uses) -> None:
    assert called is not None
    weight: Any = called.weight
    once = len(uses.calls(called)) == 1 and len(uses.holders(weight)) == 1
    if not once or uses.readers(weight) or uses.is_within(called):
        raise Refused(f"the weight of '{user.target}', which would take its factor, is shared")


def _passes_factors(module: fx.GraphModule, node: fx.Node, called: nn.Module | None) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module" and isinstance(called, _HOMOGENEOUS_LAYERS):
        return True
    if node.target in (_HOMOGENEOUS if node.op == "call_function" else _HOMOGENEOUS_METHODS):
        return True
    return kind_of(module, node) in (Kind.ALIAS, Kind.SLICE, Kind.DROP, Kind.POOL)
