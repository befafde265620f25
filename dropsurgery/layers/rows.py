"""Some rows of a batch: taken out of it, and added back to where they came from.

What a branch with `DropPath(mode="subset")` runs between. In eval there are no `Rows`, and each
function is what stood in the network before: the value itself, and the plain add.

The rows are a window of the batch that may go around its end: no more than two slices, so that
taking them is a view or one copy, and adding them back reads and writes every row once. The same
window is an index where the tensors are small: then the calls cost more than the copies, and an
index needs a third of them. (Autograd keeps the rows that were taken and the branch's result then,
which a window does without.) In compiled code a window's first sample is a tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropsurgery.layers.compiled_rows import Start, along, spread_window, take_window, turn

# A tensor of so many elements or fewer: calls from Python take longer than to copy it.
SMALL = 1 << 18


class Rows(NamedTuple):
    """Which samples a branch is computed for, and how it counts.

    Attributes:
        index: int64 (k,), the samples in the order in which they stand in the branch, where they
            are no window; None otherwise.
        mask: (B,), the factor of each sample, where the branch is computed for all of them.
        last: whether the last row counts; in compiled code a bool tensor ().
        scale: the factor of every row that counts.
        window: first sample and number of samples of a window that goes around the batch's end.
        traced: the same in compiled code, where the first sample is a tensor ().
    """

    index: Tensor | None = None  # type: ignore[assignment]  # tuple.index is of no use here
    mask: Tensor | None = None
    last: bool | Tensor = True
    scale: float = 1.0
    window: tuple[int, int] | None = None
    traced: tuple[Tensor, int] | None = None


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
    if rows.traced is not None:
        return take_window(x, rows.traced, axis)
    assert rows.index is not None
    dense, moved = _dense(x, axis)
    taken = dense.index_select(axis, rows.index)
    return taken.movedim(-1, 1) if moved else taken


class Order:
    """In which order a fork's samples stand, and the gradient that comes back to it.

    The sum of a block may be written with its samples turned around, so that the window of the next
    branch stands first in it: a view, where a window that goes around the end has to be copied and
    kept for the backward. What writes every row anyway (the sum, and the fork's gradient) turns
    them at no cost. The gradient of the skip alone is handed through as it comes.

    Attributes:
        fork: the sample that stands first in the fork.
        sum: the sample that stands first in the gradient of the sum.
    """

    __slots__ = ("fork", "sum")

    def __init__(self, fork: int = 0) -> None:
        self.fork = self.sum = fork


def split_rows(
    x: Tensor, rows: Rows | None, axis: int = 0, order: Order | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return a tensor as it is, for the skip, and its chosen rows, for the branch.

    What `(x, take_rows(x, rows, axis))` gives, with a backward that adds the two gradients in one
    go. Neither may be written to. Whatever else reads the tensor later should read the first one.

    Args:
        x: any tensor with B entries on `axis`.
        rows: what `DropPath.rows` drew; None in eval.
        axis: where the batch is.
        order: how the samples stand, where nothing but the `add_rows` that gets the same order
            reads the first result; in compiled code the sample that stands first, the first of
            these rows.
    """
    if rows is not None and rows.traced is not None and order is not None:
        return x, x.narrow(axis, 0, rows.traced[1])
    if rows is None or rows.window is None:
        return x, take_rows(x, rows, axis)
    if not isinstance(order, Order):
        order = Order()
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, _window(x, rows.window, axis, order.fork)
    whole, taken = _SplitRows.apply(x, rows.window, axis, order)
    return whole, taken


def like_rows(x: Tensor, rows: Rows | None, axis: int = 0) -> Tensor:
    """Return a view of as many rows as were chosen, to be asked for its shape only."""
    if rows is None or rows.mask is not None:
        return x
    window = rows.window or rows.traced
    if window is not None:
        return x.narrow(axis, 0, window[1])
    assert rows.index is not None
    return x.narrow(axis, 0, rows.index.shape[0])


def add_rows(
    skip: Tensor,
    branch: Tensor,
    rows: Rows | None,
    axis: int = 0,
    in_place: bool = False,
    order: Order | Tensor | None = None,
    to: Start = 0,
    *,
    over: bool = False,
) -> Tensor:
    """Return skip + branch, where the branch was computed for the chosen rows.

    Args:
        skip: (B, …) along `axis`.
        branch: (k, …) along `axis`, a row for each chosen sample; otherwise of the shape of `skip`
            or one that broadcasts with it.
        rows: what `DropPath.rows` drew; None in eval.
        axis: where the batch is.
        in_place: write the sum into `skip`.
        order: what `split_rows` got, where `skip` is its first result.
        to: the sample that is to stand first in the sum; for a window, and in compiled code.
        over: a masked sum may be written over the branch, where that saves time.
    """
    if rows is None:
        return skip.add_(branch) if in_place else skip + branch
    if rows.mask is not None:
        mask = along(rows.mask, branch, axis).to(branch.dtype)
        return turn(_add_masked(skip, branch, mask, in_place, over), axis, 0, to)
    if axis != 0 or skip.dtype != branch.dtype or skip.shape[1:] != branch.shape[1:]:
        skip, branch = _alike(skip, branch, axis, in_place)
    if rows.traced is not None:
        skip = turn(skip, axis, order if isinstance(order, Tensor) else 0, to)
        part = _weighted(branch, rows, axis)
        spread = spread_window(part, rows.traced, skip.shape[axis], axis, to)
        return skip.add_(spread) if in_place else skip + spread
    if rows.window is not None and not in_place:
        factors = rows.scale, bool(rows.last)
        sum_: Tensor = _AddRows.apply(skip, branch, rows.window, factors, axis, order, to)
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


def _add_masked(skip: Tensor, branch: Tensor, mask: Tensor, in_place: bool, over: bool) -> Tensor:
    """Return skip + branch · mask, without a product of its own where shapes and dtypes allow."""
    if skip.shape != branch.shape or skip.dtype != branch.dtype:
        return skip.add_(branch * mask) if in_place else skip + branch * mask
    if in_place:
        return skip.addcmul_(branch, mask)
    if over and branch.numel() > SMALL and not torch.compiler.is_compiling():
        total: Tensor = _AddMasked.apply(branch, skip, mask)
        return total
    return torch.addcmul(skip, branch, mask)


def _weighted(branch: Tensor, rows: Rows, axis: int) -> Tensor:
    """Return the rows of a branch as they count: scale times each, the last one or not."""
    branch, count = branch * rows.scale, branch.shape[axis]
    counts = (torch.arange(count, device=branch.device) < count - 1) | rows.last
    return torch.where(along(counts, branch, axis), branch, 0.0)


class _SplitRows(torch.autograd.Function):
    """x for the skip, and its window for the branch; backward: one sum of the two gradients.

    Autograd's own path makes a zero gradient of the whole, copies the window's into it and adds.
    """

    @staticmethod
    def forward(
        x: Tensor, window: tuple[int, int], axis: int, order: Order
    ) -> tuple[Tensor, Tensor]:
        return x.view_as(x), _window(x, window, axis, order.fork)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.window, ctx.axis, ctx.order = inputs
        ctx.like = x.shape, x.dtype, x.device
        # One without a gradient is none, not zeros to be added.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        whole, taken = gradients
        window, order = ctx.window, ctx.order
        if whole is None:
            if taken is None:
                return None, None, None, None
            shape, dtype, device = ctx.like
            whole = torch.zeros(shape, dtype=dtype, device=device)
        if taken is None:
            if order.sum == order.fork:
                return whole, None, None, None
            window, taken = (order.fork, 0), whole.narrow(ctx.axis, 0, 0)
        total = _add_window(whole, taken, window, 1.0, ctx.axis, order.sum, order.fork)
        return total, None, None, None


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
        factors: tuple[float, bool],
        axis: int,
        order: Order | None,
        to: int,
    ) -> Tensor:
        scale, last = factors
        if not last:
            first, size = window
            window, branch = (first, size - 1), branch.narrow(axis, 0, size - 1)
        if order is not None:
            order.sum = to
        at = 0 if order is None else order.fork
        return _add_window(skip, branch, window, scale, axis, at, to)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        skip, _, ctx.window, ctx.factors, ctx.axis, ctx.order, ctx.to = inputs
        ctx.batch = skip.shape[ctx.axis]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        (scale, last), axis, branch, skip = ctx.factors, ctx.axis, None, gradient
        if ctx.needs_input_grad[1]:
            branch = _scaled_window(gradient, ctx.window, scale, axis, ctx.to)
            if not last:
                branch.narrow(axis, ctx.window[1] - 1, 1).zero_()
        if ctx.order is None and ctx.to and ctx.needs_input_grad[0]:
            skip = _window(gradient, (0, ctx.batch), axis, ctx.to)
        return skip, branch, None, None, None, None, None


class _AddMasked(torch.autograd.Function):
    """skip + mask · branch, written over the branch, as networks do whose blocks end in `+=`.

    A sum of its own is a tensor more to be written to memory that no cache holds.
    """

    @staticmethod
    def forward(branch: Tensor, skip: Tensor, mask: Tensor) -> Tensor:
        return torch.addcmul(skip, branch, mask, out=branch)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        branch, _, mask = inputs
        ctx.mark_dirty(branch)
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return gradients[0] * mask, gradients[0], None


# Between the operations of a branch the caches are cold, and a call from Python costs many times
# what it costs in a loop: what follows makes few of them. `at` and `to` are the samples that stand
# first in what is read and in what is written.


def _window(x: Tensor, window: tuple[int, int], axis: int, at: int = 0) -> Tensor:
    """Return the rows of a window: a view, or one copy where it goes around the end."""
    first, size = window
    batch = x.shape[axis]
    first = (first - at) % batch
    over = first + size - batch
    if over <= 0:
        return x.narrow(axis, first, size)
    return torch.cat((x.narrow(axis, first, size - over), x.narrow(axis, 0, over)), axis)


def _add_to(total: Tensor, part: Tensor, window: tuple[int, int], scale: float, axis: int) -> None:
    """Add scale · part to the rows of a window, in place."""
    for start, size, _, inner in _pieces(total.shape[axis], window, 0, 0):
        if inner is not None:
            total.narrow(axis, start, size).add_(part.narrow(axis, inner, size), alpha=scale)


def _add_window(
    whole: Tensor,
    part: Tensor,
    window: tuple[int, int],
    scale: float,
    axis: int,
    at: int = 0,
    to: int = 0,
) -> Tensor:
    """Return `whole` with scale · part added on a window: every row is written once."""
    pieces = _pieces(whole.shape[axis], window, at, to)
    if torch.is_grad_enabled():  # a second derivative is asked for
        rows = []
        for _, size, source, inner in pieces:
            row = whole.narrow(axis, source, size)
            if inner is not None:
                row = row.add(part.narrow(axis, inner, size), alpha=scale)
            rows.append(row)
        return torch.cat(rows, axis)
    total = torch.empty_like(whole)
    for start, size, source, inner in pieces:
        row, target = whole.narrow(axis, source, size), total.narrow(axis, start, size)
        if inner is None:
            target.copy_(row)
        else:
            torch.add(row, part.narrow(axis, inner, size), alpha=scale, out=target)
    return total


def _pieces(
    batch: int, window: tuple[int, int], at: int, to: int
) -> list[tuple[int, int, int, int | None]]:
    """Cut what is written where the window, or what is read, begins or ends.

    Returns:
        For each piece its start and size, and where it begins in what is read and in the window.
    """
    first, size = window
    cuts = sorted({0, (first - to) % batch, (first + size - to) % batch, (at - to) % batch})
    pieces = []
    for start, end in zip(cuts, [*cuts[1:], batch], strict=True):
        inner = (start + to - first) % batch
        source = (start + to - at) % batch
        pieces.append((start, end - start, source, inner if inner < size else None))
    return pieces


def _scaled_window(
    x: Tensor, window: tuple[int, int], scale: float, axis: int, at: int = 0
) -> Tensor:
    """Return scale times the rows of a window, written once."""
    first, size = window
    batch = x.shape[axis]
    first = (first - at) % batch
    over = first + size - batch
    if over <= 0 or torch.is_grad_enabled():
        return _window(x, window, axis, at) * scale
    scaled = torch.empty_like(x.narrow(axis, 0, size))
    late, early = x.narrow(axis, first, size - over), x.narrow(axis, 0, over)
    torch.mul(late, scale, out=scaled.narrow(axis, 0, size - over))
    torch.mul(early, scale, out=scaled.narrow(axis, size - over, over))
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
