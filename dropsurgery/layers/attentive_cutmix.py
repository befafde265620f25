"""Attentive CutMix: what a pretrained network looks at in one image, pasted into another."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropsurgery.errors import ArgumentError, ArgumentTypeError
from dropsurgery.layers.noise import check_generator, check_input

Layout = Literal["NCHW", "NHWC", "NLC"]


class Mixed(NamedTuple):
    """What `AttentiveCutMix` returns.

    Attributes:
        images: (N, C, H, W), the mixed images.
        labels: (N, classes), lam · labels[source] + (1 - lam) · labels; None where none were given.
        lam: (N,), the share of each image that was pasted in.
        source: int64 (N,), which image it was pasted from.
        mask: bool (N, 1, H, W), the pixels that were pasted in.
    """

    images: Tensor
    labels: Tensor | None
    lam: Tensor
    source: Tensor
    mask: Tensor


class AttentiveCutMix(nn.Module):
    """Pastes the most attended cells of one image of a mini-batch into another.

    Walawalkar et al., "Attentive CutMix: An Enhanced Data Augmentation Approach for Deep Learning
    Based Image Classification", ICASSP 2020, arXiv:2003.13048. In training the mini-batch is
    shuffled; of image source[i], the `cells` cells with the strongest activation (the mean over the
    channels of a feature map of a pretrained network, averaged within each cell of the grid) are
    copied into image i at their own place. Labels are mixed by the share of pixels that were
    pasted: cells/49 on a 7 by 7 grid that divides the image, else the exact share.

    Any network will do, tapped at any layer: `ds.tap(resnet, "layer4")` returns a module that
    computes the feature map. It runs in eval mode and without gradients, whatever mode this module
    is in. In eval the images are returned as they are, with lam 0.

    Args:
        attention: images (N, C, H, W) → activation.
        cells: how many cells are pasted, at least 1 and at most all of them.
        grid: cells along an edge, or (rows, columns); the activation is averaged to it.
        layout: the axes of the activation; without, NCHW for rank 4 and NLC for rank 3. In NLC the
            L tokens are a square map, after one class token where L - 1 is a square.
        generator: shuffles the mini-batch; None for the global generator.

    Shape:
        images (N, C, H, W), floating point, at least as many pixels along an edge as cells;
        labels (N,) integers with `num_classes`, or (N, classes) probabilities.

    Raises:
        ArgumentError, ArgumentTypeError: a grid or cells that cannot be, an unknown layout, no
            generator; images, labels or an activation of other shapes.
    """

    generator: torch.Generator | None

    def __init__(
        self,
        attention: nn.Module,
        cells: int = 6,
        grid: int | tuple[int, int] = 7,
        *,
        layout: Layout | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(attention, nn.Module):
            raise ArgumentTypeError(
                f"attention is a module that returns a feature map, got {attention!r}",
                fix="ds.tap(model, 'layer4')",
            )
        edges = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if len(edges) != 2 or any(type(edge) is not int or edge < 1 for edge in edges):
            raise ArgumentError(f"grid is a number of cells, or (rows, columns), got {grid!r}")
        if type(cells) is not int or not 1 <= cells <= edges[0] * edges[1]:
            raise ArgumentError(
                f"cells must lie in 1 … {edges[0] * edges[1]} for this grid, got {cells!r}"
            )
        if layout is not None and layout not in get_args(Layout):
            raise ArgumentError(f"unknown layout {layout!r}", fix="'NCHW', 'NHWC' or 'NLC'")
        self.attention = attention.eval()
        self.cells = cells
        self.grid = edges
        self.layout = layout
        self.generator = check_generator(generator)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module; the network that looks stays in eval mode."""
        super().train(mode)
        self.attention.eval()
        return self

    def forward(
        self, images: Tensor, labels: Tensor | None = None, num_classes: int | None = None
    ) -> Mixed:
        """Return mixed images and labels; see `Mixed`."""
        check_input(images, self, (4,))
        count, _, height, width = images.shape
        if height < self.grid[0] or width < self.grid[1]:
            raise ArgumentError(
                f"a grid of {self.grid} cells does not fit images of {height} by {width} pixels"
            )
        soft = None if labels is None else _soft(labels, count, num_classes)
        if not self.training:
            source = torch.arange(count, device=images.device)
            mask = torch.zeros((count, 1, height, width), dtype=torch.bool, device=images.device)
            return Mixed(images, soft, mask.flatten(1).float().mean(1), source, mask)
        where = images.device if self.generator is None else self.generator.device
        source = torch.randperm(count, generator=self.generator, device=where).to(images.device)
        mask = self._attended(images)[source]
        lam = mask.flatten(1).float().mean(1)
        mixed = torch.where(mask, images[source], images)
        if soft is not None:
            share = lam.unsqueeze(1).to(soft.dtype)
            soft = share * soft[source] + (1.0 - share) * soft
        return Mixed(mixed, soft, lam, source, mask)

    @torch.no_grad()
    def _attended(self, images: Tensor) -> Tensor:
        """Return (N, 1, H, W): the pixels of the most attended cells of each image."""
        activation = self.attention(images)
        heat = F.adaptive_avg_pool2d(_heat(activation, self.layout), self.grid)
        best = heat.flatten(1).topk(self.cells).indices
        cells = torch.zeros_like(heat, dtype=torch.bool).flatten(1).scatter(1, best, True)
        cells = cells.view(-1, 1, *self.grid)
        for axis, edge in zip((2, 3), self.grid, strict=True):
            pixels = torch.arange(images.shape[axis], device=images.device)
            cells = cells.index_select(axis, pixels * edge // images.shape[axis])
        return cells

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        return f"cells={self.cells}, grid={self.grid}"


def _heat(activation: object, layout: Layout | None) -> Tensor:
    """Return (N, h, w): the mean over the channels of an activation."""
    rank = activation.ndim if isinstance(activation, Tensor) else 0
    layout = layout or {4: "NCHW", 3: "NLC"}.get(rank)  # type: ignore[assignment]
    if not isinstance(activation, Tensor) or layout is None or rank != len(layout):
        found = (
            f"shape {tuple(activation.shape)}" if isinstance(activation, Tensor) else "no tensor"
        )
        raise ArgumentError(
            f"the attention network returned {found}, where {layout or 'a feature map'} is needed",
            fix="tap a layer whose output is (N, C, h, w), or name its layout",
        )
    if layout == "NCHW":
        return activation.float().mean(1)
    heat = activation.float().mean(-1)
    if layout == "NHWC":
        return heat
    tokens = heat.shape[1]
    for extra in (0, 1):
        edge = math.isqrt(tokens - extra)
        if edge * edge == tokens - extra:
            return heat[:, extra:].unflatten(1, (edge, edge))
    raise ArgumentError(
        f"{tokens} tokens are no square map, with a class token or without",
        fix="tap a layer whose output is (N, C, h, w)",
    )


def _soft(labels: Tensor, count: int, num_classes: int | None) -> Tensor:
    """Return labels as (N, classes) probabilities."""
    if labels.ndim == 2 and len(labels) == count and labels.is_floating_point():
        return labels
    if labels.shape != (count,) or labels.is_floating_point() or num_classes is None:
        raise ArgumentError(
            f"labels are (N,) integers with num_classes, or (N, classes) probabilities, got "
            f"{labels.dtype} of shape {tuple(labels.shape)} with num_classes={num_classes}"
        )
    return F.one_hot(labels.long(), num_classes).float()
