"""Rounding weights to half precision so that their errors cancel in a sum."""

from __future__ import annotations

import torch
from torch import Tensor

# The square of an input's mean over its variance, that rounding reckons with. Behind a ReLU that a
# standard normal value went through they are 1/(2π) and 1/2 - 1/(2π): 0.47.
_MEAN_OVER_VARIANCE = 0.5
HALF = frozenset({torch.float16, torch.bfloat16})


def round_rows(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round the weights of each output channel once, to one of the two numbers next to each.

    A layer whose weights err by e₁ … eₙ errs by Σ eᵢxᵢ. With inputs of variance v and mean m that
    is v·Σ eᵢ² + m²·(Σ eᵢ)² on average: next to the errors' squares their sum counts, behind a
    ReLU above all, and it is the same at every position, so that pooling does not average it
    away. In float16 and bfloat16 the few weights that lie closest to the middle between two
    numbers are therefore rounded to the other side, until Σ eᵢ² + ½(Σ eᵢ)² is least along that
    order. What is representable stays as it is, zeros too. Wider dtypes are rounded to nearest.

    Args:
        values: the weights, (output channels, …), float64.
        dtype: of the result.

    Returns:
        The rounded weights, of the same shape.
    """
    if dtype not in HALF or values.ndim < 2:
        return values.to(dtype)
    return _balanced(values.flatten(1), dtype).view(values.shape)


def _balanced(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round the rows of a matrix."""
    nearest = values.to(dtype)  # torch goes through float32, which moves ties by 2⁻²⁵ at most
    error = nearest.double() - values
    other = _other_side(nearest, error)
    turned = other.double() - values
    total = error.sum(1, keepdim=True)
    helps = (error * total > 0) & other.isfinite() & (other != nearest)
    change, cost = turned - error, turned.square() - error.square()
    order = torch.where(helps, cost / change.abs(), torch.inf).argsort(1)
    sums = total + torch.where(helps, change, 0.0).gather(1, order).cumsum(1)
    costs = torch.where(helps, cost, torch.inf).gather(1, order).cumsum(1)
    before = _MEAN_OVER_VARIANCE * total.square()
    after = costs + _MEAN_OVER_VARIANCE * sums.square()
    count = torch.cat((before, after), 1).argmin(1, keepdim=True)
    rank = order.argsort(1)
    return torch.where(rank < count, other, nearest)


def _other_side(nearest: Tensor, error: Tensor) -> Tensor:
    """Return the number next to each, on the side where the value that was rounded lies."""
    bits = nearest.view(torch.int16)
    # Numbers of one sign are in the order of their bits, away from zero.
    outwards = (nearest > 0) == (error < 0)
    moved = torch.where(outwards, bits + 1, bits - 1)
    return torch.where(nearest == 0, bits, moved).view(nearest.dtype)
