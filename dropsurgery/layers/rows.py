"""Some rows of a batch: taken out of it, and added back to where they came from.

What a branch with `DropPath(mode="subset")` runs between. In eval there are no `Rows`, and each
function is what stood in the network before: the value itself, and the plain add.

The rows are a window of the batch that may go around its end: no more than two slices, so that
taking them is a view or one copy, and adding them back reads and writes every row once. Compiled
code gets the same window as an index, whose operations the compiler fuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Which samples a branch is computed for, and how it counts.

    Attributes:
        index: int64 (k,), the samples in the order in which they stand in the branch, where they
            are no window; None otherwise.
        mask: (B,), the factor of each sample, where the branch is computed for all of them.
        last: whether the last row counts; in compiled code a bool tensor ().
        scale: the factor of every row that counts.
        window: first sample and number of samples of a window that goes around the batch's end.
    """

    index: Tensor | None = None  # type: ignore[assignment]  # tuple.index is of no use here
    mask: Tensor | None = None
    last: bool | Tensor = True
    scale: float = 1.0
    window: tuple[int, int] | None = None


def take_rows(x: Tensor, rows: Rows | None, axis: int = 0) -> Tensor:
    """Return the chosen rows of a tensor, in its memory format; all of it where all are chosen.

    Args:
        x: any tensor with B entries on `axis`.
        rows: what `DropPath.rows` drew; None in eval.
        axis: where the batch is.
    """
    if rows is None or rows.mask is not None:
        return x
    if rows.window is not None:
        parts = [x.narrow(axis, first, size) for first, size, _ in _slices(rows.window, x, axis)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
    assert rows.index is not None
    dense, moved = _dense(x, axis)
    taken = dense.index_select(axis, rows.index)
    return taken.movedim(-1, 1) if moved else taken


def split_rows(x: Tensor, rows: Rows | None, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Return a tensor as it is, for the skip, and its chosen rows, for the branch.

    What `(x, take_rows(x, rows, axis))` gives, with a backward that adds the two gradients in one
    go. Neither may be written to. Whatever else reads the tensor later should read the first one.
    """
    if rows is None or rows.window is None or not (x.requires_grad and torch.is_grad_enabled()):
        return x, take_rows(x, rows, axis)
    whole, taken = _SplitRows.apply(x, rows.window, axis)
    return whole, taken


def like_rows(x: Tensor, rows: Rows | None, axis: int = 0) -> Tensor:
    """Return a view of as many rows as were chosen, to be asked for its shape only."""
    if rows is None or rows.mask is not None:
        return x
    if rows.window is not None:
        return x.narrow(axis, 0, rows.window[1])
    assert rows.index is not None
    return x.narrow(axis, 0, rows.index.shape[0])


def add_rows(
    skip: Tensor, branch: Tensor, rows: Rows | None, axis: int = 0, in_place: bool = False
) -> Tensor:
    """Return skip + branch, where the branch was computed for the chosen rows.

    Args:
        skip: (B, …) along `axis`.
        branch: (k, …) along `axis`, a row for each chosen sample; otherwise of the shape of `skip`
            or one that broadcasts with it.
        rows: what `DropPath.rows` drew; None in eval.
        axis: where the batch is.
        in_place: write the sum into `skip`.
    """
    if rows is not None and rows.mask is not None:
        branch = branch * along(rows.mask, branch, axis).to(branch.dtype)
    if rows is None or rows.mask is not None:
        return skip.add_(branch) if in_place else skip + branch
    dtype = skip.dtype if in_place else torch.promote_types(skip.dtype, branch.dtype)
    shape = torch.broadcast_shapes(skip.select(axis, 0).shape, branch.select(axis, 0).shape)
    branch = _spread(branch.to(dtype), shape, axis)
    if not in_place:
        skip = _spread(skip.to(dtype), shape, axis)
    if rows.window is not None and not in_place:
        last = bool(rows.last)
        sum_: Tensor = _AddRows.apply(skip, branch, rows.window, last, rows.scale, axis)
        return sum_
    branch = _weighted(branch, rows, axis)
    if rows.window is not None:
        for first, size, offset in _slices(rows.window, skip, axis):
            skip.narrow(axis, first, size).add_(branch.narrow(axis, offset, size))
        return skip
    assert rows.index is not None
    if in_place:
        return skip.index_add_(axis, rows.index, branch)
    dense, moved = _dense(skip, axis)
    total = dense.index_add(axis, rows.index, branch.movedim(1, -1) if moved else branch)
    return total.movedim(-1, 1) if moved else total


def _weighted(branch: Tensor, rows: Rows, axis: int) -> Tensor:
    """Return the rows of a branch as they count: scale times each, the last one or not."""
    branch = branch * rows.scale
    if rows.last is True:
        return branch
    count = branch.shape[axis]
    counts = (torch.arange(count, device=branch.device) < count - 1) | rows.last
    return torch.where(along(counts, branch, axis), branch, 0.0)


def along(mask: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return a (B,) mask in the rank of `x`, along `axis`."""
    return mask.view([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


class _SplitRows(torch.autograd.Function):
    """x for the skip, and its window for the branch; backward: one sum of the two gradients.

    Autograd's own path makes a zero gradient of the whole, copies the window's into it and adds.
    """

    @staticmethod
    def forward(x: Tensor, window: tuple[int, int], axis: int) -> tuple[Tensor, Tensor]:
        taken = take_rows(x, Rows(window=window), axis)
        return x.view_as(x), taken

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.window, ctx.axis = inputs
        ctx.like = x.shape, x.dtype, x.device
        # One without a gradient is none, not zeros to be added.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        whole, taken = gradients
        if taken is None:
            return whole, None, None
        if whole is None:
            shape, dtype, device = ctx.like
            whole = torch.zeros(shape, dtype=dtype, device=device)
        return _add_window(whole, taken, ctx.window, 1.0, ctx.axis), None, None


class _AddRows(torch.autograd.Function):
    """out = skip, plus scale · branch on a window, the last row of which may not count.

    Autograd's own path (branch times weights, then an add on slices of a copy) reads and writes
    the branch once more each way, and keeps it for the backward.
    """

    @staticmethod
    def forward(
        skip: Tensor,
        branch: Tensor,
        window: tuple[int, int],
        last: bool,
        scale: float,
        axis: int,
    ) -> Tensor:
        first, size = window
        if not last:
            size -= 1
        return _add_window(skip, branch.narrow(axis, 0, size), (first, size), scale, axis)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.window, ctx.last, ctx.scale, ctx.axis = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        axis, branch = ctx.axis, None
        if ctx.needs_input_grad[1]:
            branch = _scaled_window(gradient, ctx.window, ctx.scale, axis)
            if not ctx.last:
                branch.narrow(axis, ctx.window[1] - 1, 1).zero_()
        return gradient, branch, None, None, None, None


def _slices(window: tuple[int, int], x: Tensor, axis: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, number of rows, place in the window) of the one or two slices of it."""
    first, size = window
    before_end = min(size, x.shape[axis] - first)
    if before_end:
        yield first, before_end, 0
    if before_end < size:
        yield 0, size - before_end, before_end


def _add_window(
    whole: Tensor, part: Tensor, window: tuple[int, int], scale: float, axis: int
) -> Tensor:
    """Return `whole` with scale · part added on a window: every row is written once."""
    if torch.is_grad_enabled():  # a second derivative is asked for
        total = whole.clone()
        for first, size, offset in _slices(window, whole, axis):
            total.narrow(axis, first, size).add_(part.narrow(axis, offset, size), alpha=scale)
        return total
    total = torch.empty_like(whole)
    batch, (start, count) = whole.shape[axis], window
    for first, size, offset in _slices(window, whole, axis):
        torch.add(
            whole.narrow(axis, first, size),
            part.narrow(axis, offset, size),
            alpha=scale,
            out=total.narrow(axis, first, size),
        )
    for first, size, _ in _slices(((start + count) % batch, batch - count), whole, axis):
        total.narrow(axis, first, size).copy_(whole.narrow(axis, first, size))
    return total


def _scaled_window(x: Tensor, window: tuple[int, int], scale: float, axis: int) -> Tensor:
    """Return scale times the rows of a window, written once."""
    slices = list(_slices(window, x, axis))
    if len(slices) == 1 or torch.is_grad_enabled():
        return take_rows(x, Rows(window=window), axis) * scale
    shape = list(x.shape)
    shape[axis] = window[1]
    _, moved = _dense(x, axis)
    form = torch.contiguous_format
    if moved:
        form = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    scaled = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
    for first, size, offset in slices:
        part = x.narrow(axis, first, size)
        torch.mul(part, scale, out=scaled.narrow(axis, offset, size))
    return scaled


def _dense(x: Tensor, axis: int) -> tuple[Tensor, bool]:
    """Return `x` with its channels moved last where its memory has them there, and whether it is.

    index_select and index_add write rows in the default format, whatever the input's is.
    """
    if axis == 0 and x.ndim in (4, 5) and not x.is_contiguous():
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        if x.is_contiguous(memory_format=last):
            return x.movedim(1, -1), True
    return x, False


def _spread(x: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """Broadcast a tensor to `shape` beside its batch axis."""
    if x.select(axis, 0).shape == shape:
        return x
    full = list(shape)
    full.insert(axis, x.shape[axis])
    return x.expand(full)
