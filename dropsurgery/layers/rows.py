"""Some rows of a batch: taken out of it, and added back to where they came from.

What a branch with `DropPath(mode="subset")` runs between. In eval there are no `Rows`, and each
function is what stood in the network before: the value itself, and the plain add.

The rows are a window of the batch that may go around its end: no more than two slices, so that
taking them is a view or one copy, and adding them back reads and writes every row once. The same
window is an index in compiled code, whose operations the compiler fuses, and where the tensors are
small: then the calls cost more than the copies, and an index needs a third of them.
"""

from __future__ import annotations

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
        return _window(x, rows.window, axis)
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
    if rows is None:
        return skip.add_(branch) if in_place else skip + branch
    if rows.mask is not None:
        mask = along(rows.mask, branch, axis).to(branch.dtype)
        if skip.shape == branch.shape and skip.dtype == branch.dtype:  # no product of its own
            return skip.addcmul_(branch, mask) if in_place else torch.addcmul(skip, branch, mask)
        return skip.add_(branch * mask) if in_place else skip + branch * mask
    if axis != 0 or skip.dtype != branch.dtype or skip.shape[1:] != branch.shape[1:]:
        skip, branch = _alike(skip, branch, axis, in_place)
    if rows.window is not None and not in_place:
        last = bool(rows.last)
        sum_: Tensor = _AddRows.apply(skip, branch, rows.window, last, rows.scale, axis)
        return sum_
    scale = rows.scale
    if rows.last is not True:
        branch, scale = _weighted(branch, rows, axis), 1.0
    if rows.window is not None:
        _add_to(skip, branch, rows.window, scale, axis)
        return skip
    assert rows.index is not None
    if in_place:
        return skip.index_add_(axis, rows.index, branch, alpha=scale)
    dense, moved = _dense(skip, axis)
    branch = branch.movedim(1, -1) if moved else branch
    total = dense.index_add(axis, rows.index, branch, alpha=scale)
    return total.movedim(-1, 1) if moved else total


def _weighted(branch: Tensor, rows: Rows, axis: int) -> Tensor:
    """Return the rows of a branch as they count: scale times each, the last one or not."""
    branch, count = branch * rows.scale, branch.shape[axis]
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
        return x.view_as(x), _window(x, window, axis)

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
        if not last:
            first, size = window
            window, branch = (first, size - 1), branch.narrow(axis, 0, size - 1)
        return _add_window(skip, branch, window, scale, axis)

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


# Between the operations of a branch the caches are cold, and a call from Python costs many times
# what it costs in a loop: what follows makes few of them.


def _window(x: Tensor, window: tuple[int, int], axis: int) -> Tensor:
    """Return the rows of a window: a view, or one copy where it goes around the end."""
    first, size = window
    over = first + size - x.shape[axis]
    if over <= 0:
        return x.narrow(axis, first, size)
    return torch.cat((x.narrow(axis, first, size - over), x.narrow(axis, 0, over)), axis)


def _add_to(total: Tensor, part: Tensor, window: tuple[int, int], scale: float, axis: int) -> None:
    """Add scale · part to the rows of a window, in place."""
    first, size = window
    over = first + size - total.shape[axis]
    if over <= 0:
        total.narrow(axis, first, size).add_(part, alpha=scale)
        return
    late, early = part.split((size - over, over), axis)
    total.narrow(axis, first, size - over).add_(late, alpha=scale)
    total.narrow(axis, 0, over).add_(early, alpha=scale)


def _add_window(
    whole: Tensor, part: Tensor, window: tuple[int, int], scale: float, axis: int
) -> Tensor:
    """Return `whole` with scale · part added on a window: every row is written once."""
    if torch.is_grad_enabled():  # a second derivative is asked for
        total = whole.clone()
        _add_to(total, part, window, scale, axis)
        return total
    first, size = window
    batch = whole.shape[axis]
    over = first + size - batch
    total = torch.empty_like(whole)
    if over <= 0:
        sizes = (first, size, -over)
        before, inside, after = whole.split(sizes, axis)
        to_before, to_inside, to_after = total.split(sizes, axis)
        torch.add(inside, part, alpha=scale, out=to_inside)
        if first:
            to_before.copy_(before)
        if over:
            to_after.copy_(after)
        return total
    sizes = (over, batch - size, size - over)
    early, between, late = whole.split(sizes, axis)
    to_early, to_between, to_late = total.split(sizes, axis)
    part_late, part_early = part.split((size - over, over), axis)
    torch.add(early, part_early, alpha=scale, out=to_early)
    torch.add(late, part_late, alpha=scale, out=to_late)
    if batch > size:
        to_between.copy_(between)
    return total


def _scaled_window(x: Tensor, window: tuple[int, int], scale: float, axis: int) -> Tensor:
    """Return scale times the rows of a window, written once."""
    first, size = window
    over = first + size - x.shape[axis]
    if over <= 0 or torch.is_grad_enabled():
        return _window(x, window, axis) * scale
    late, early = x.narrow(axis, first, size - over), x.narrow(axis, 0, over)
    scaled = torch.empty_like(x.narrow(axis, 0, size))
    to_late, to_early = scaled.split((size - over, over), axis)
    torch.mul(late, scale, out=to_late)
    torch.mul(early, scale, out=to_early)
    return scaled


def _alike(skip: Tensor, branch: Tensor, axis: int, in_place: bool) -> tuple[Tensor, Tensor]:
    """Return both in the dtype and, beside the batch axis, the shape that their sum has."""
    dtype = skip.dtype if in_place else torch.promote_types(skip.dtype, branch.dtype)
    shape = torch.broadcast_shapes(skip.select(axis, 0).shape, branch.select(axis, 0).shape)
    branch = _spread(branch.to(dtype), shape, axis)
    return skip if in_place else _spread(skip.to(dtype), shape, axis), branch


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
