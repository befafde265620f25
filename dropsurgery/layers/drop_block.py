"""DropBlock: contiguous regions of feature maps dropped, at exactly the rate that was asked for."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropsurgery.errors import ArgumentError, ArgumentTypeError
from dropsurgery.layers.noise import check_generator, check_input, check_rate, uniform

# Newton's steps from the start below reach rounding for every p up to 1 - 1e-6; see the tests.
_STEPS = 12


class _DropBlock(nn.Module):
    """What the 2-d and 3-d layers share."""

    axes: ClassVar[int]
    generator: torch.Generator | None

    def __init__(
        self,
        p: float = 0.1,
        block_size: int | tuple[int, ...] = 7,
        *,
        per_channel: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.p = check_rate(p)
        self.block_size = _sizes(block_size, self.axes)
        self.per_channel = per_channel
        self.generator = check_generator(generator)

    def _drop(self, x: Tensor) -> Tensor:
        check_input(x, self, (self.axes + 2,))
        sizes = tuple(x.shape[2:])
        blocks = tuple(map(min, self.block_size, sizes))
        starts = tuple(size - block + 1 for size, block in zip(sizes, blocks, strict=True))
        seeds: float | Tensor
        if torch.compiler.is_compiling():
            # In the graph, so that a new rate is a new number and no new compilation.
            seeds, scale = _solve(sizes, blocks, self.p, x.device, torch.float32)
        else:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            seeds, scale = _solved(sizes, blocks, self.p, x.device, dtype)
        channels = x.shape[1] if self.per_channel else 1
        drawn = uniform(x, (x.shape[0], channels, *starts), self.generator) < seeds
        # Bytes, not bools, of which `|` and `where` take ten times as long on a CPU.
        dropped = drawn.to(torch.uint8)
        for axis in range(self.axes - 1, -1, -1):
            dropped = _spread(dropped, blocks[axis], axis - self.axes)
        mask = (dropped ^ 1).to(scale.dtype) * scale
        return (x * mask).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        text = f"p={self.p:.4g}, block_size={self.block_size}"
        return text if self.per_channel else f"{text}, per_channel=False"


class DropBlock2d(_DropBlock):
    """Drops square blocks of feature maps; the share of dropped units is exactly `p`.

    Ghiasi et al., "DropBlock: A regularization method for convolutional networks", 2018,
    arXiv:1810.12890. In training each position at which a block lies wholly inside the map starts
    a block with probability g, and units under a block are zero. A unit i that n_i such positions
    cover is dropped with probability 1 - (1 - g)^n_i, less at the borders than inside. The paper's
    g = p·HW/(k²·(H - k + 1)·(W - k + 1)) counts every overlap twice and drops too little; here g
    is the solution of

        mean over i of (1 - g)^n_i = 1 - p,

    so that the expected share of dropped units is p for every size of map and block. The map is
    then divided by its own keep probability, unit by unit, which keeps the expectation of each.
    (The paper divides by the share that happened to be kept, which couples the samples of a
    mini-batch.) In eval, and with p = 0, the input itself is returned.

    A block that is larger than the map is cut to the map; even sizes are as good as odd ones.

    Args:
        p: share of units to drop, in [0, 1). (1 - p is the paper's keep_prob, which it lowers
            from 1 to its target during training: see `ds.RateSchedule`.)
        block_size: edge of a block, or (height, width).
        per_channel: whether each channel has blocks of its own, or all channels of a sample share.
        generator: where the draws come from; None for the global generator.

    Shape:
        (N, C, H, W), floating point; output the same.

    Raises:
        ArgumentError, ArgumentTypeError: p outside [0, 1), a block size below 1, no generator; in
            training, an input of another rank or not of floating point.
    """

    axes = 2

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with blocks dropped (training) or as it is (eval)."""
        if not self.training or self.p == 0.0:
            return x
        return self._drop(x)


class DropBlock3d(_DropBlock):
    """Drops cubic blocks of (N, C, D, H, W); see `DropBlock2d`.

    Args:
        p: share of units to drop, in [0, 1).
        block_size: edge of a block, or (depth, height, width).
        per_channel: whether each channel has blocks of its own, or all channels of a sample share.
        generator: where the draws come from; None for the global generator.
    """

    axes = 3

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with blocks dropped (training) or as it is (eval)."""
        if not self.training or self.p == 0.0:
            return x
        return self._drop(x)


def _sizes(block_size: object, axes: int) -> tuple[int, ...]:
    sizes = block_size if isinstance(block_size, tuple | list) else (block_size,) * axes
    if len(sizes) != axes or any(type(size) is not int for size in sizes):
        raise ArgumentTypeError(
            f"block_size is an int or a tuple of {axes}, got {block_size!r}", fix="for example 7"
        )
    if min(sizes) < 1:
        raise ArgumentError(f"block_size must be 1 or more, got {block_size!r}")
    return tuple(sizes)


def _solve(
    sizes: tuple[int, ...],
    blocks: tuple[int, ...],
    p: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return g, and the factor 1/(1 - g)^n_i of every unit that is kept.

    With t = -log(1 - g), the logarithm of the mean of exp(-n_i·t) is convex in t. Newton's method
    therefore comes monotonically from the left to where it is log(1 - p), from the start that the
    mean of n_i gives, which by Jensen's inequality lies to the left.
    """
    counts = torch.ones((), device=device, dtype=dtype)
    for size, block in zip(sizes, blocks, strict=True):
        i = torch.arange(size, device=device, dtype=dtype)
        inside = min(block, size - block + 1)
        covering = torch.minimum(i + 1, size - i).clamp(max=inside)
        counts = counts.unsqueeze(-1) * covering
    goal = torch.log1p(torch.zeros((), device=device, dtype=dtype) - p)
    t = -goal / counts.mean()
    for _ in range(_STEPS):
        weights = torch.exp(-counts * t)
        slope = (counts * weights).mean() / weights.mean()
        t = t + (weights.mean().log() - goal) / slope
    return -torch.expm1(-t), torch.exp(counts * t)


@lru_cache(maxsize=256)
def _solved(
    sizes: tuple[int, ...],
    blocks: tuple[int, ...],
    p: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, Tensor]:
    """Return g and the factors, solved in float64 on the host, once for each size and rate."""
    with torch.no_grad(), torch.inference_mode(False):
        seeds, scale = _solve(sizes, blocks, p, torch.device("cpu"), torch.float64)
        return float(seeds), scale.to(device, dtype)


def _spread(seeds: Tensor, block: int, axis: int) -> Tensor:
    """Return, along an axis, which units a block covers that starts at a seed.

    The window is doubled in each step. An axis with one start only is left to broadcasting.
    """
    starts = seeds.shape[axis]
    if starts == 1 or block == 1:
        return seeds
    covered = F.pad(seeds, (0, 0) * (-axis - 1) + (block - 1, block - 1))
    width = 1
    while width < block:
        step = min(width, block - width)
        length = covered.shape[axis] - step
        covered = covered.narrow(axis, 0, length) | covered.narrow(axis, step, length)
        width += step
    return covered
