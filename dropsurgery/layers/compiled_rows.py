"""Rows of a batch in compiled code: every row that is written is looked up.

Autograd's own way back from taken rows adds to rows by their numbers. A compiler for a CPU neither
vectorises such additions nor fuses them with their neighbours; a subset then took as long as the
whole. Looking up goes into the loops around it. So each function here has a backward of its own,
which looks up as well.

A window begins at `start`, goes around the batch's end and holds `count` samples; sizes are
integers, where it begins is a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Start = int | Tensor


def along(mask: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return a (B,) mask in the rank of `x`, along `axis`."""
    return mask.view([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def take_window(x: Tensor, window: tuple[Tensor, int], axis: int) -> Tensor:
    """Return the rows of a window, copied."""
    taken: Tensor = _Take.apply(x, *_numbers(x.shape[axis], *window), axis)
    return taken


def spread_window(
    part: Tensor, window: tuple[Tensor, int], batch: int, axis: int, to: Start = 0
) -> Tensor:
    """Return a batch of zeros with the rows of a window in it, the sample `to` first."""
    start, count = window
    spread: Tensor = _Spread.apply(part, *_numbers(batch, start - to, count), axis)
    return spread


def turn(x: Tensor, axis: int, at: Start, to: Start) -> Tensor:
    """Return a batch in which the sample `at` stands first so that `to` does.

    Either is a tensor or 0; where both are 0 that is the batch itself.
    """
    by, batch = to - at, x.shape[axis]
    if isinstance(by, int):
        return x
    turned: Tensor = _Turn.apply(x, *_numbers(batch, by, batch), axis)
    return turned


def rectify(x: Tensor) -> Tensor:
    """Return a ReLU of which autograd keeps the result.

    Where only some rows of that result are kept for the next branch, a compiler would keep a
    bool for each element beside them; torch's writes such masks to memory ten times slower on a
    CPU than the result itself. Other than torch's, the gradient is NaN where the result is 0 and
    what comes back infinite, and 0 where the result is NaN.
    """
    rectified: Tensor = _Rectify.apply(x)
    return rectified


def _numbers(batch: int, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the (count,) samples of a window, and where each of the batch stands in it.

    Where a sample is none of the window's, that is `count` or more. A start may be up to a batch
    too small. No remainder is taken: it would be, by a slow instruction, for every vector that is
    looked up.
    """
    start = start + torch.where(start < 0, batch, 0)
    index = torch.arange(count, device=start.device) + start
    places = torch.arange(batch, device=start.device) - start
    return index - torch.where(index < batch, 0, batch), places + torch.where(places < 0, batch, 0)


class _Take(torch.autograd.Function):
    """The chosen rows; backward: each where it came from, among zeros."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, places: Tensor, axis: int) -> Tensor:
        return x.index_select(axis, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, places, ctx.axis = inputs
        ctx.save_for_backward(index, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(gradients[0], *ctx.saved_tensors, ctx.axis), None, None, None


class _Spread(_Take):
    """Rows, each where it came from, among zeros; backward: the chosen rows."""

    @staticmethod
    def forward(part: Tensor, index: Tensor, places: Tensor, axis: int) -> Tensor:
        count = index.shape[0]
        spread = part.index_select(axis, places.clamp(max=count - 1))
        return torch.where(along(places < count, spread, axis), spread, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Take.apply(gradients[0], *ctx.saved_tensors, ctx.axis), None, None, None


class _Turn(_Take):
    """All rows in another order; backward: in the order that they had."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        index, places = ctx.saved_tensors
        return _Turn.apply(gradients[0], places, index, ctx.axis), None, None, None


class _Rectify(torch.autograd.Function):
    """ReLU; backward: the gradient times the sign of the result."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.relu()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return gradients[0] * result.sign()
