"""Weight decay where it decays something, and an L1 penalty that says what it zeroed."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dropsurgery.errors import ArgumentError, ArgumentTypeError
from dropsurgery.graph.scale import Visibility, visibilities
from dropsurgery.graph.trace import trace
from dropsurgery.tables import render

Where = str | tuple[str, ...] | Callable[[str, nn.Parameter], bool]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class ScaleInvariant:
    """What `find_scale_invariant` returns.

    Attributes:
        invariant: the parameters whose scale the network cannot see.
        visible: the others, each with what sees it.
    """

    invariant: tuple[Visibility, ...]
    visible: tuple[Visibility, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the invariant parameters."""
        return tuple(found.name for found in self.invariant)

    def __iter__(self) -> Iterator[Visibility]:
        return iter(self.invariant)

    def __len__(self) -> int:
        return len(self.invariant)

    def __str__(self) -> str:
        rows = [
            (found.name, ", ".join(found.norms), "training" if found.batch else "both")
            for found in self.invariant
        ]
        title = f"{len(rows)} parameters of {len(rows) + len(self.visible)} without a visible scale"
        return render(("parameter", "divided out by", "in mode"), rows, title=title)


def find_scale_invariant(model: nn.Module, *, example_inputs: Any = None) -> ScaleInvariant:
    """Find the parameters whose scale the network cannot see, because a normalisation follows.

    Multiplied by any a > 0, such a parameter gives the same outputs: exactly but for the
    normalisation's eps, whose share shrinks with a. L2 decay of it does not regularise the network;
    it only makes the effective learning rate grow as the weight shrinks (van Laarhoven 2017,
    arXiv:1706.05350). In front of a BatchNorm this holds in training mode, whose statistics follow
    the weights; in front of LayerNorm, GroupNorm, RMSNorm and InstanceNorm in both modes.

    Proved on the graph: every way from the parameter's layer leads through operations that a
    factor passes (ReLU, pooling, dropout, reshaping, other weights) into a normalisation. A bias in
    front of a BatchNorm is found, too: it is subtracted again. Where a proof fails, the parameter
    is visible, and what stopped it is told.

    Args:
        model: any `nn.Module`, or a GraphModule that dropsurgery returned. It is not changed.
        example_inputs: as in `trace`, where the forward needs them.

    Raises:
        ArgumentTypeError: `model` is no module.
        TraceError: the network cannot be turned into a graph.
    """
    _check_module(model, "find_scale_invariant")
    found = list(visibilities(trace(model, example_inputs=example_inputs), model))
    return ScaleInvariant(
        tuple(one for one in found if one.norms), tuple(one for one in found if not one.norms)
    )


def weight_decay_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    norms: bool = False,
    biases: bool = False,
    scale_invariant: bool = True,
    where: Where | None = None,
    example_inputs: Any = None,
) -> list[dict[str, Any]]:
    """Return the groups of parameters for an optimiser: those to decay, and those not to.

    Args:
        model: the network. Parameters that do not require a gradient are in no group.
        weight_decay: the decay of the first group, 0 or more; the second has 0.
        norms: decay the parameters of normalisations, too.
        biases: decay biases, too.
        scale_invariant: decay parameters whose scale the network cannot see; False leaves out those
            that `find_scale_invariant` proves.
        where: what else is left out: a pattern for the parameter's name (as in `fnmatch`), a tuple
            of such, or a callable of (name, parameter).
        example_inputs: as in `trace`; used with `scale_invariant=False`.

    Returns:
        `[{"params": …, "weight_decay": weight_decay, "names": …}, {…, "weight_decay": 0.0, …}]`,
        for example for `torch.optim.AdamW`; a group without parameters is left out.

    Raises:
        ArgumentError, ArgumentTypeError: a decay that is no number of 0 or more, a `where` that is
            none or matches nothing, a network without parameters to train.
    """
    _check_module(model, "weight_decay_groups")
    _check_strength(weight_decay, "weight_decay")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ArgumentError("the network has no parameters to train", where=type(model).__name__)
    spared = {name for name, _ in _chosen(named, where)} if where is not None else set()
    if not norms:
        spared |= {
            f"{path}.{name}" if path else name
            for path, layer in model.named_modules()
            if isinstance(layer, _NORMS) or type(layer).__name__.endswith("Norm")
            for name, _ in layer.named_parameters(recurse=False)
        }
    if not biases:
        spared |= {name for name, _ in named if name.rpartition(".")[2].endswith("bias")}
        spared |= {name for name, _ in named if name.rpartition(".")[2].startswith("bias_")}
    if not scale_invariant:
        spared |= set(find_scale_invariant(model, example_inputs=example_inputs).names)
    groups = []
    for decay, chosen in ((float(weight_decay), False), (0.0, True)):
        members = [(name, p) for name, p in named if (name in spared) is chosen]
        if members:
            names = [name for name, _ in members]
            params = [p for _, p in members]
            groups.append({"params": params, "weight_decay": decay, "names": names})
    return groups


@dataclass(frozen=True)
class Zeros:
    """How many entries of the chosen parameters are zero.

    Attributes:
        counts: (parameter, zeros, entries) for each of them.
        threshold: the magnitude up to which an entry counts as zero.
    """

    counts: tuple[tuple[str, int, int], ...]
    threshold: float

    @property
    def share(self) -> float:
        """The share of zeros, in [0, 1]."""
        return sum(zeros for _, zeros, _ in self.counts) / sum(size for _, _, size in self.counts)

    def __str__(self) -> str:
        rows = [(name, zeros, size, f"{zeros / size:.1%}") for name, zeros, size in self.counts]
        at_most = f"|w| ≤ {self.threshold:g}" if self.threshold else "w = 0"
        title = f"{self.share:.1%} of the entries are zero ({at_most})"
        return render(("parameter", "zeros", "entries", "share"), rows, title=title)


class L1Penalty:
    """An L1 penalty over chosen parameters, strength·Σ|w|, and what it zeroed.

    Add `penalty()` to the loss for its (sub)gradient; this brings weights near zero and, with
    floating-point numbers, hardly ever onto it. Or call `penalty.shrink(lr)` after each optimiser
    step in its place: soft thresholding, the proximal step of the same penalty (Daubechies et al.
    2004), which sets weights to exactly zero.

    Args:
        model: the network.
        strength: the factor, 0 or more.
        where: which parameters: a pattern for their names (as in `fnmatch`), a tuple of such, or a
            callable of (name, parameter).

    Raises:
        ArgumentError, ArgumentTypeError: a strength that is no number of 0 or more, a `where` that
            is none or matches nothing.
    """

    def __init__(self, model: nn.Module, strength: float, where: Where = "*weight") -> None:
        _check_module(model, "L1Penalty")
        self.strength = _check_strength(strength, "strength")
        self.parameters = _chosen(list(model.named_parameters()), where)

    def __call__(self) -> Tensor:
        """Return strength·Σ|w| as a scalar with a gradient."""
        total = torch.stack([p.abs().sum() for _, p in self.parameters]).sum()
        return self.strength * total

    @torch.no_grad()
    def shrink(self, lr: float) -> None:
        """Move every weight towards zero by lr·strength, and no further than zero, in place.

        Args:
            lr: the optimiser's learning rate, 0 or more.
        """
        step = _check_strength(lr, "lr") * self.strength
        for _, p in self.parameters:
            p.copy_(p.sign() * (p.abs() - step).clamp(min=0.0))

    @torch.no_grad()
    def zeros(self, threshold: float = 0.0) -> Zeros:
        """Return how many entries of each parameter are zero, or at most `threshold` in size."""
        limit = _check_strength(threshold, "threshold")
        counts = tuple(
            (name, int((p.abs() <= limit).sum()), p.numel()) for name, p in self.parameters
        )
        return Zeros(counts, limit)

    def __repr__(self) -> str:
        return f"L1Penalty(strength={self.strength:g}, {len(self.parameters)} parameters)"


def _chosen(named: list[tuple[str, nn.Parameter]], where: Any) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that `where` means."""
    if callable(where):
        found = [(name, p) for name, p in named if where(name, p)]
    elif isinstance(where, str) or (
        isinstance(where, tuple | list) and all(isinstance(w, str) for w in where)
    ):
        patterns = (where,) if isinstance(where, str) else where
        found = [
            (name, p)
            for name, p in named
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        ]
    else:
        raise ArgumentTypeError(
            f"where chooses parameters by a pattern, several, or a callable, got {where!r}",
            fix="'layer4.*', ('*.weight', 'head.*') or lambda name, p: p.ndim > 1",
        )
    if not found:
        known = ", ".join(name for name, _ in named[:6])
        raise ArgumentError(
            f"where={where!r} matches none of the {len(named)} parameters",
            where=known + (", …" if len(named) > 6 else ""),
            fix="names of model.named_parameters()",
        )
    return found


def _check_strength(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"{name} is a number, got {value!r}")
    if not 0.0 <= float(value) < math.inf:
        raise ArgumentError(f"{name} is {value!r}", fix="0 or more")
    return float(value)


def _check_module(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"{name} takes a torch.nn.Module, got {type(model).__name__}")
