"""How far a value inside a network may be off: the gate of outputs, for many values at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dropsurgery.verify.gate import Gate, Ratio, Tally, errors, unit, widened

# One operation may be exact in torch, by luck or because it only moves data, and a few units of
# rounding off in another runtime, whose exponentials are polynomials of its own and whose norms may
# lose digits where a mean is large.
LOCAL_GATE = Gate(rmse=12.0, maximum=24.0, typical=24.0, mean=24.0, floor=8.0)
# Next to zero, a norm divides what is left after a subtraction of what is nearly alike.
_FAINT = 8.0


class Weighed(NamedTuple):
    """One value's error.

    Attributes:
        error: root mean square against float64, relative to the value.
        own: that of the network.
        ratio: the worst ratio of the two over its limit.
        reason: what is wrong; "" where the ratio is at most one.
    """

    error: float
    own: float
    ratio: float
    reason: str


def weigh(native: Tensor, wide: Tensor, value: Tensor, *, faint: bool) -> Weighed:
    """Weigh one value.

    Args:
        native: the network's tensor.
        wide: the same in float64.
        value: the candidate's, of any shape.
        faint: whether the input was next to zero.
    """
    if value.numel() != native.numel():
        reason = f"shape {tuple(value.shape)} instead of {tuple(native.shape)}"
        return Weighed(math.inf, 0.0, math.inf, reason)
    if not native.numel():
        return Weighed(0.0, 0.0, 0.0, "")
    value = value.reshape(native.shape).to(native.dtype)
    if native.is_complex() or not all(t.isfinite().all() for t in (native, wide, value)):
        return _weigh_slowly(native, wide, value, faint)
    # Few passes: a network has tens of millions of such elements.
    own, other = _norms(native.double() - wide), _norms(value.double() - wide)
    size, peak = _norms(wide)
    if not size:
        size = peak = 1.0
    floor = LOCAL_GATE.floor * unit(native.dtype)
    limits = (widened(gate, native.numel()) for gate in (LOCAL_GATE.rmse, LOCAL_GATE.maximum))
    ratios = [
        Ratio(kind, mine / max(its, floor * scale / limit), limit)
        for kind, mine, its, scale, limit in zip(
            ("rmse", "max"), other, own, (size, max(peak, size)), limits, strict=True
        )
    ]
    return _worst(other[0] / size, own[0] / size, ratios, faint)


def _norms(tensor: Tensor) -> tuple[float, float]:
    """Return (root mean square, largest magnitude)."""
    norm = torch.linalg.vector_norm
    return float(norm(tensor)) / math.sqrt(tensor.numel()), float(norm(tensor, math.inf))


def _weigh_slowly(native: Tensor, wide: Tensor, value: Tensor, faint: bool) -> Weighed:
    """Weigh a value that is not finite everywhere, as a mask of attention is not."""
    tally = Tally(native.dtype)
    tally.add(native, wide, value, "this input")
    if tally.problem.startswith("the reference itself returns NaN"):
        return Weighed(0.0, 0.0, 0.0, "")
    if tally.problem:
        return Weighed(math.inf, 0.0, math.inf, tally.problem)
    found = errors(tally, LOCAL_GATE)
    if found is None:
        return Weighed(0.0, 0.0, 0.0, "")
    return _worst(found.candidate, found.reference, list(found.ratios), faint)


def _worst(error: float, own: float, ratios: list[Ratio], faint: bool) -> Weighed:
    worst = max(ratios, key=lambda ratio: ratio.value / ratio.limit)
    limit = worst.limit * (_FAINT if faint else 1.0)
    ratio = worst.value / limit
    reason = f"{worst.kind} ratio {worst.value:.3g} > {limit:.2g}" if ratio > 1 else ""
    return Weighed(error, own, ratio, reason)
