"""Mean, variance, share and independence of what is drawn, against theory."""

from __future__ import annotations

import math

import pytest
import torch

from dropsurgery import layers
from dropsurgery.errors import ArgumentError, ArgumentTypeError
from tests.drop_helpers import assert_mean, assert_uncorrelated, assert_variance, seeded

COUNT = 20_000


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (layers.Dropout, (COUNT, 1)),
        (layers.Dropout1d, (COUNT // 2, 2, 1)),
        (layers.Dropout2d, (COUNT // 2, 2, 1, 1)),
        (layers.Dropout3d, (COUNT // 2, 2, 1, 1, 1)),
    ],
)
def test_inverted_dropout(build: type, shape: tuple[int, ...], p: float) -> None:
    y = build(p, generator=seeded(1))(torch.ones(shape, dtype=torch.float64)).flatten()
    assert set(y.tolist()) == {0.0, 1 / (1 - p)}
    assert_mean((y == 0).double(), p)
    assert_mean(y, 1.0)
    assert_variance(y, p / (1 - p))


@pytest.mark.parametrize("build", [layers.Dropout1d, layers.Dropout2d, layers.Dropout3d])
def test_channels_are_dropped_whole_and_alone(build: type) -> None:
    rank = {layers.Dropout1d: 3, layers.Dropout2d: 4, layers.Dropout3d: 5}[build]
    x = torch.ones(4_000, 2, *[3] * (rank - 2))
    y = build(0.3, generator=seeded(2))(x).flatten(2)
    assert torch.equal(y, y[..., :1].expand_as(y))
    assert_uncorrelated(y[:, 0, 0], y[:, 1, 0])  # channels
    assert_uncorrelated(y[:-1, 0, 0], y[1:, 0, 0])  # samples


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_spatial_dropout_of_another_rank(rank: int) -> None:
    with pytest.raises(ArgumentError, match=r"Dropout2d needs a tensor of rank 4, got shape"):
        layers.Dropout2d(0.5)(torch.ones((2,) * rank))


def test_half_precision_keeps_the_rate_and_rounds_once() -> None:
    p = 0.0625 / 17  # a rate that draws in half precision could not have
    x = torch.ones(400_000, dtype=torch.bfloat16)
    y = layers.Dropout(p, generator=seeded(3))(x)
    assert_mean((y == 0).float(), p)
    x = torch.rand(1_000, generator=seeded(4)).bfloat16()
    y = layers.Dropout(0.3, generator=seeded(4))(x)
    exact = (x.double() / 0.7).bfloat16()
    assert torch.equal(y[y != 0], exact[y != 0])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_classic_dropout(p: float) -> None:
    layer = layers.ClassicDropout(p, generator=seeded(5))
    x = torch.full((COUNT,), 3.0, dtype=torch.float64)
    y = layer(x)
    assert set(y.tolist()) == {0.0, 3.0}
    assert_mean(y, 3.0 * (1 - p))
    assert_variance(y, 9.0 * p * (1 - p))
    # What eval returns is what training returns on average.
    assert torch.equal(layer.eval()(x), x * (1 - p))


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_uniform_dropout(beta: float) -> None:
    layer = layers.UniformDropout(beta, generator=seeded(6))
    assert layer.beta == pytest.approx(beta, rel=1e-12)
    y = layer(torch.ones(COUNT, dtype=torch.float64))
    assert_mean(y, 1.0)
    assert_variance(y, beta**2 / 3)
    assert float(y.min()) >= 1 - beta
    assert float(y.max()) < 1 + beta
    assert float(y.max() - y.min()) > 1.99 * beta


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("build", [layers.UniformDropout.matching, layers.GaussianDropout])
def test_noise_has_the_variance_of_dropout(build: type, p: float) -> None:
    y = build(p, generator=seeded(7))(torch.full((COUNT,), 2.0))
    assert_mean(y, 2.0)
    assert_variance(y, 4.0 * p / (1 - p))
    assert_uncorrelated(y[: COUNT // 2], y[COUNT // 2 :])


@pytest.mark.parametrize("beta", [-0.1, math.inf, math.nan])
def test_a_width_that_is_none(beta: float) -> None:
    with pytest.raises(ArgumentError, match=r"beta must be 0 or more"):
        layers.UniformDropout(beta)
    with pytest.raises(ArgumentTypeError, match=r"beta must be a number, got 'wide'"):
        layers.UniformDropout("wide")  # type: ignore[arg-type]


# DropConnect


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_drop_connect_keeps_the_expectation(p: float) -> None:
    weight = torch.randn(5, 4, generator=seeded(8), dtype=torch.float64)
    x = torch.randn(1, 4, generator=seeded(9), dtype=torch.float64)
    layer = layers.DropConnect(p, generator=seeded(10))
    y = torch.cat([x @ layer(weight).T for _ in range(4_000)])
    assert_mean(y, (x @ weight.T)[0])
    # Var of Σ m_i w_i x_i with independent inverted masks.
    assert_variance(y[:, 0], float((weight[0] * x[0]).square().sum() * p / (1 - p)))


def test_drop_connect_draws_for_each_sample() -> None:
    weight = torch.ones(1, 1, dtype=torch.float64)
    x = torch.ones(COUNT, 1, dtype=torch.float64)
    layer = layers.DropConnect(0.3, per_sample=True, generator=seeded(11))
    masked = layer(weight, x)
    assert masked.shape == (COUNT, 1, 1)
    y = layers.linear(x, masked).flatten()
    assert_mean(y, 1.0)
    assert_variance(y, 0.3 / 0.7)
    assert_uncorrelated(y[:-1], y[1:])


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4), (6, 2, 3, 4)])
def test_a_linear_layer_with_a_weight_for_each_sample(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=seeded(12), dtype=torch.float64)
    weight = torch.randn(6, 5, 4, generator=seeded(13), dtype=torch.float64)
    bias = torch.randn(5, generator=seeded(14), dtype=torch.float64)
    expected = torch.stack([torch.nn.functional.linear(x[i], weight[i], bias) for i in range(6)])
    torch.testing.assert_close(layers.linear(x, weight, bias), expected, rtol=1e-12, atol=1e-12)
    plain = torch.nn.functional.linear(x, weight[0], bias)
    assert torch.equal(layers.linear(x, weight[0], bias), plain)


def test_masks_for_each_sample_need_samples() -> None:
    layer = layers.DropConnect(0.3, per_sample=True)
    for x in (None, torch.ones(4)):
        with pytest.raises(ArgumentError, match=r"needs the input \(N, …\) beside the weight"):
            layer(torch.ones(3, 4), x)


# Weighted Channel Dropout

SCORES = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3], dtype=torch.float64)


def channels(count: int = COUNT) -> torch.Tensor:
    """Return maps (count, 5, 2, 2) whose channels have the scores above as means."""
    spread = torch.tensor([[0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    return (SCORES[:, None, None] * spread).expand(count, 5, 2, 2)


def test_weighted_channels_first_draw() -> None:
    y = layers.WeightedChannelDropout(0.8, generator=seeded(15))(channels())
    kept = (y.sum((2, 3)) > 0).double()
    assert torch.equal(kept.sum(1), torch.ones(COUNT, dtype=torch.float64))
    assert_mean(kept, SCORES / SCORES.sum())


def test_weighted_channels_without_replacement() -> None:
    y = layers.WeightedChannelDropout(0.6, generator=seeded(16))(channels())
    kept = (y.sum((2, 3)) > 0).double()
    assert torch.equal(kept.sum(1), torch.full((COUNT,), 2.0, dtype=torch.float64))
    shares = SCORES / SCORES.sum()
    second = [
        sum(float(shares[j] * shares[i] / (1 - shares[j])) for j in range(5) if j != i)
        for i in range(5)
    ]
    assert_mean(kept, shares + torch.tensor(second))


def test_weighted_channels_keep_the_sum_of_the_scores() -> None:
    x = channels(50)
    for p, random_p in ((0.4, 0.0), (0.6, 0.0), (0.2, 0.5)):
        y = layers.WeightedChannelDropout(p, random_p, generator=seeded(17))(x)
        total = y.mean((2, 3)).sum(1)
        kept = total > 0
        torch.testing.assert_close(total[kept], torch.ones_like(total[kept]))
        assert bool(kept.all()) or random_p > 0.0


def test_weighted_channels_dropped_at_random_besides() -> None:
    x = torch.ones(COUNT, 4, 2)
    y = layers.WeightedChannelDropout(0.0, 0.25, generator=seeded(18))(x)
    kept = (y[..., 0] > 0).double()
    assert_mean(kept, 0.75)
    assert_uncorrelated(kept[:, 0], kept[:, 1])


def test_weighted_channels_of_a_silent_or_negative_map() -> None:
    layer = layers.WeightedChannelDropout(0.5, generator=seeded(19))
    assert torch.equal(layer(torch.zeros(3, 4, 2, 2)), torch.zeros(3, 4, 2, 2))
    x = torch.tensor([-1.0, -2.0, 3.0, 1.0]).view(1, 4, 1, 1).expand(200, 4, 2, 2)
    y = layer(x)
    # Negative scores count as 0: the positive channels are those that are kept.
    assert bool((y[:, :2] == 0).all())
    assert torch.equal(y[:, 2:], x[:, 2:])


def test_weighted_channels_want_space() -> None:
    with pytest.raises(
        ArgumentError, match=r"needs a tensor of rank 3 or 4 or 5, got shape .2, 3."
    ):
        layers.WeightedChannelDropout(0.5)(torch.ones(2, 3))


# Cutout


def brute_force(size: int, height: int, width: int) -> float:
    """Return the mean area by cutting at every centre."""
    total = 0
    for row in range(height):
        for column in range(width):
            image = torch.ones(height, width)
            top, left = row - size // 2, column - size // 2
            image[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
            total += int((image == 0).sum())
    return total / (height * width)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 9, 30])
def test_the_mean_area_of_cutout_is_exact(size: int) -> None:
    layer = layers.Cutout(size, generator=seeded(20))
    assert layer.mean_area(8, 11) == pytest.approx(brute_force(size, 8, 11), rel=1e-12)
    y = layer(torch.ones(5_000, 2, 8, 11))
    assert torch.equal(y[:, 0], y[:, 1])
    area = (y[:, 0] == 0).sum((1, 2)).double()
    assert_mean(area, layer.mean_area(8, 11))
    if 1 < size < 20:  # the others always cut the same
        assert_uncorrelated(area[:-1], area[1:])


def test_the_papers_cutout() -> None:
    assert layers.Cutout(16).mean_area(32, 32) == 196.0
    assert layers.Cutout(16, 0.5).mean_area(32, 32) == 98.0


def test_cutout_cuts_one_box_and_sometimes_none() -> None:
    y = layers.Cutout(3, 0.6, value=7.0, generator=seeded(21))(torch.zeros(3_000, 1, 9, 8))
    cut = (y == 7.0).flatten(1).any(1).double()
    assert_mean(cut, 0.6)
    for image in y[:200, 0]:
        rows, columns = (image == 7.0).nonzero(as_tuple=True)
        if len(rows):
            box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert bool((box == 7.0).all())
            assert max(box.shape) <= 3


@pytest.mark.parametrize("size", [0, -2])
def test_a_square_without_pixels(size: int) -> None:
    with pytest.raises(ArgumentError, match=r"size must be 1 or more"):
        layers.Cutout(size)
    with pytest.raises(ArgumentTypeError, match=r"size must be an int, got 2.5"):
        layers.Cutout(2.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"needs a tensor of rank 4, got shape .3, 8, 8."):
        layers.Cutout(4)(torch.ones(3, 8, 8))
