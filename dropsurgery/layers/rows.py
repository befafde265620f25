"""Some rows of a batch: taken out of it, and added back to where they came from.

What a branch with `DropPath(mode="subset")` runs between. In eval there are no `Rows`, and each
function is what stood in the network before: the value itself, and the plain add.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Which samples a branch is computed for, and how it counts.

    Attributes:
        index: int64 (k,), the samples in the order in which they stand in the branch; None for all
            of them, in their own order.
        mask: (B,), the factor of each sample, where `index` is None.
        last: whether the last row of `index` counts; in compiled code a bool tensor ().
        scale: the factor of every row that counts.
    """

    index: Tensor | None  # type: ignore[assignment]  # tuple.index is of no use here
    mask: Tensor | None = None
    last: bool | Tensor = True
    scale: float = 1.0


def take_rows(x: Tensor, rows: Rows | None, axis: int = 0) -> Tensor:
    """Return the chosen rows of a tensor, in its memory format; all of it where all are chosen.

    Args:
        x: any tensor with B entries on `axis`.
        rows: what `DropPath.rows` drew; None in eval.
        axis: where the batch is.
    """
    if rows is None or rows.index is None:
        return x
    dense, moved = _dense(x, axis)
    taken = dense.index_select(axis, rows.index)
    return taken.movedim(-1, 1) if moved else taken


def like_rows(x: Tensor, rows: Rows | None, axis: int = 0) -> Tensor:
    """Return a view of as many rows as were chosen, to be asked for its shape only."""
    if rows is None or rows.index is None:
        return x
    return x.narrow(axis, 0, rows.index.shape[0])


def add_rows(
    skip: Tensor, branch: Tensor, rows: Rows | None, axis: int = 0, in_place: bool = False
) -> Tensor:
    """Return skip + branch, where the branch was computed for the chosen rows.

    Args:
        skip: (B, …) along `axis`.
        branch: (k, …) along `axis`, row i for sample `rows.index[i]`; otherwise of the shape of
            `skip` or one that broadcasts with it.
        rows: what `DropPath.rows` drew; None in eval.
        axis: where the batch is.
        in_place: write the sum into `skip`.
    """
    if rows is not None and rows.index is None:
        assert rows.mask is not None
        branch = branch * along(rows.mask, branch, axis).to(branch.dtype)
    if rows is None or rows.index is None:
        return skip.add_(branch) if in_place else skip + branch
    if in_place:
        return skip.index_add_(axis, rows.index, _weighted(branch, rows, axis).to(skip))
    dtype = torch.promote_types(skip.dtype, branch.dtype)
    shape = torch.broadcast_shapes(skip.select(axis, 0).shape, branch.select(axis, 0).shape)
    skip, branch = (_spread(value.to(dtype), shape, axis) for value in (skip, branch))
    if torch.compiler.is_compiling():
        # The compiler takes no function of its own gradient with a size that hangs on the rate.
        dense, moved = _dense(skip, axis)
        added = _weighted(branch, rows, axis)
        out = dense.index_add(axis, rows.index, added.movedim(1, -1) if moved else added)
        return out.movedim(-1, 1) if moved else out
    sum_: Tensor = _AddRows.apply(skip, branch, rows.index, rows.last, rows.scale, axis)
    return sum_


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


class _AddRows(torch.autograd.Function):
    """out = skip, plus scale · branch at the rows of `index`, the last of which may not count.

    Autograd's own path (branch times weights, then index_add) reads and writes the branch once more
    each way, and keeps a copy of it for the backward.
    """

    @staticmethod
    def forward(
        skip: Tensor, branch: Tensor, index: Tensor, last: bool, scale: float, axis: int
    ) -> Tensor:
        # The clone itself is returned: an in-place activation may not write to a function's view.
        out = skip.clone()
        dense, moved = _dense(out, axis)
        branch = branch.movedim(1, -1) if moved else branch
        count = index.shape[0] - (not last)
        dense.index_add_(axis, index[:count], branch.narrow(axis, 0, count), alpha=scale)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, index, ctx.last, ctx.scale, ctx.axis = inputs
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        (index,) = ctx.saved_tensors
        branch = None
        if ctx.needs_input_grad[1]:
            dense, moved = _dense(gradient, ctx.axis)
            branch = dense.index_select(ctx.axis, index).mul_(ctx.scale)
            if not ctx.last:
                branch.narrow(ctx.axis, index.shape[0] - 1, 1).zero_()
            branch = branch.movedim(-1, 1) if moved else branch
        return gradient, branch, None, None, None, None


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
