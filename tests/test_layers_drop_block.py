"""DropBlock drops whole blocks, and exactly the share that it was asked for."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from torch import Tensor

from dropsurgery import layers
from dropsurgery.errors import ArgumentError, ArgumentTypeError
from dropsurgery.layers.drop_block import _solved
from tests.drop_helpers import assert_mean, assert_uncorrelated, seeded

SIZES = [(1, 1), (1, 3), (2, 2), (5, 3), (7, 7), (7, 9), (8, 4), (14, 7), (14, 2), (28, 7)]


def maps(layer: torch.nn.Module, count: int, *sizes: int) -> Tensor:
    """Return what a layer makes of maps of ones, as (count, …): one channel each."""
    return layer(torch.ones(count, 1, *sizes, dtype=torch.float64))[:, 0]


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
@pytest.mark.parametrize(("edge", "block"), SIZES)
def test_the_share_is_the_nominal_one(edge: int, block: int, p: float) -> None:
    y = maps(layers.DropBlock2d(p, block, generator=seeded(1)), 2_000, edge, edge)
    share = (y == 0).double().flatten(1).mean(1)
    assert_mean(share, p)


@pytest.mark.parametrize("p", [0.1, 0.4])
@pytest.mark.parametrize(
    ("sizes", "block"),
    [((9, 4), 3), ((4, 9), 6), ((5, 12), (2, 7)), ((3, 4, 5), 2), ((4, 4, 2), 3), ((2, 6, 6), 4)],
)
def test_the_share_of_maps_that_are_not_square(
    sizes: tuple[int, ...], block: int | tuple[int, ...], p: float
) -> None:
    build = layers.DropBlock2d if len(sizes) == 2 else layers.DropBlock3d
    y = maps(build(p, block, generator=seeded(2)), 2_000, *sizes)
    assert_mean((y == 0).double().flatten(1).mean(1), p)
    # Each unit keeps its own expectation, at the borders too.
    assert_mean(y, 1.0)


def test_the_share_of_a_peer_fails_this_test() -> None:
    torch.manual_seed(0)
    y = maps(timm.layers.DropBlock2d(0.1, 7).train(), 2_000, 14, 14)
    with pytest.raises(AssertionError, match=r"standard errors away"):
        assert_mean((y == 0).double().flatten(1).mean(1), 0.1)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.9, 0.999999])
@pytest.mark.parametrize(("edge", "block"), [(1, 1), (2, 2), (7, 7), (14, 7), (56, 9), (13, 4)])
def test_the_equation_is_solved(edge: int, block: int, p: float) -> None:
    seeds, scale = _solved((edge,) * 2, (block,) * 2, p, torch.device("cpu"), torch.float64)
    assert float((1 / scale).mean()) == pytest.approx(1 - p, rel=1e-9)
    starts = edge - block + 1
    keep = torch.ones(edge, edge, dtype=torch.float64)
    for row, column in itertools.product(range(starts), repeat=2):
        keep[row : row + block, column : column + block] *= 1 - seeds
    torch.testing.assert_close(1 / scale, keep, rtol=1e-6, atol=1e-12)


def by_hand(seeds: Tensor, sizes: tuple[int, ...], blocks: tuple[int, ...]) -> Tensor:
    """Return which units are dropped, block by block."""
    dropped = torch.zeros(*seeds.shape[:2], *sizes, dtype=torch.bool)
    for n, c, *start in seeds.nonzero().tolist():
        region = tuple(slice(s, s + b) for s, b in zip(start, blocks, strict=True))
        dropped[(n, c, *region)] = True
    return dropped


@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        ((9, 8), 3),
        ((9, 8), 4),
        ((3, 8), 5),
        ((2, 2), 7),
        ((8, 8), 1),
        ((5, 4, 6), 2),
        ((4, 4, 4), 3),
    ],
)
def test_what_is_dropped_is_blocks(sizes: tuple[int, ...], block: int) -> None:
    build = layers.DropBlock2d if len(sizes) == 2 else layers.DropBlock3d
    layer = build(0.3, block, generator=seeded(3))
    x = torch.rand(6, 4, *sizes, generator=seeded(4)) + 1
    blocks = tuple(min(block, size) for size in sizes)
    rate, scale = _solved(sizes, blocks, 0.3, torch.device("cpu"), torch.float32)
    starts = [size - b + 1 for size, b in zip(sizes, blocks, strict=True)]
    seeds = torch.empty(6, 4, *starts).uniform_(generator=seeded(3)) < rate
    dropped = by_hand(seeds, sizes, blocks)
    y = layer(x)
    assert torch.equal(y == 0, dropped)
    torch.testing.assert_close(y, torch.where(dropped, 0.0, x * scale))
    assert bool(dropped.any())


def test_channels_draw_alone_or_together() -> None:
    x = torch.ones(3_000, 2, 5, 5)
    alone = layers.DropBlock2d(0.3, 3, generator=seeded(5))(x) == 0
    assert_uncorrelated(alone[:, 0, 2, 2], alone[:, 1, 2, 2])
    assert_uncorrelated(alone[:-1, 0, 2, 2], alone[1:, 0, 2, 2])
    together = layers.DropBlock2d(0.3, 3, per_channel=False, generator=seeded(6))(x) == 0
    assert torch.equal(together[:, 0], together[:, 1])
    assert_mean(together[:, 0].double().flatten(1).mean(1), 0.3)
    # Units under one block are dropped together.
    with pytest.raises(AssertionError):
        assert_uncorrelated(alone[:, 0, 2, 2], alone[:, 0, 2, 3])


def test_bad_sizes() -> None:
    with pytest.raises(ArgumentError, match=r"block_size must be 1 or more, got 0"):
        layers.DropBlock2d(0.1, 0)
    with pytest.raises(ArgumentTypeError, match=r"block_size is an int or a tuple of 3, got 2.5"):
        layers.DropBlock3d(0.1, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"a tuple of 3, got .3, 3."):
        layers.DropBlock3d(0.1, (3, 3))


@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 9), (2, 3, 4, 5, 6)])
def test_a_tensor_that_is_no_map(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"DropBlock2d needs a tensor of rank 4, got shape"):
        layers.DropBlock2d(0.1)(torch.ones(shape))
