"""What tests of the drop layers share: the layers, and a comparison with theory that can fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dropsurgery import layers

# Each layer as a function of its rate, and the shape of an input that it takes.
LAYERS: dict[str, tuple[Callable[[float], nn.Module], tuple[int, ...]]] = {
    "Dropout": (layers.Dropout, (8, 6)),
    "Dropout1d": (layers.Dropout1d, (8, 6, 5)),
    "Dropout2d": (layers.Dropout2d, (8, 6, 5, 4)),
    "Dropout3d": (layers.Dropout3d, (8, 6, 3, 5, 4)),
    "ClassicDropout": (layers.ClassicDropout, (8, 6)),
    "GaussianDropout": (layers.GaussianDropout, (8, 6)),
    "UniformDropout": (layers.UniformDropout.matching, (8, 6)),
    "DropBlock2d": (lambda p: layers.DropBlock2d(p, 3), (8, 6, 9, 8)),
    "DropBlock3d": (lambda p: layers.DropBlock3d(p, 2), (8, 6, 5, 4, 6)),
    "DropConnect": (layers.DropConnect, (8, 6)),
    "WeightedChannelDropout": (layers.WeightedChannelDropout, (8, 6, 5, 4)),
    "Cutout": (lambda p: layers.Cutout(3, p), (8, 3, 9, 8)),
}


def seeded(seed: int) -> torch.Generator:
    """Return a generator of its own."""
    return torch.Generator().manual_seed(seed)


def assert_mean(samples: Tensor, expected: float | Tensor) -> None:
    """Assert that the mean over the first axis is `expected`, within 4 standard errors.

    Entries of the first axis are to be independent. A constant has to be exact.
    """
    samples = samples.double()
    error = samples.std(0) / math.sqrt(len(samples))
    distance = (samples.mean(0) - expected).abs()
    worst = (distance / error.clamp_min(1e-9)).max()
    assert bool(worst <= 4.0), f"{float(worst):.2f} standard errors away from theory"


def assert_variance(samples: Tensor, expected: float) -> None:
    """Assert that the variance over the first axis is `expected`, within 4 standard errors."""
    samples = samples.double()
    assert_mean((samples - samples.mean(0)).square() * len(samples) / (len(samples) - 1), expected)


def assert_uncorrelated(left: Tensor, right: Tensor) -> None:
    """Assert that two sequences of independent pairs have no correlation, within 4 errors."""
    pair = torch.stack([left.double(), right.double()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) <= 4.0 / math.sqrt(pair.shape[1])
