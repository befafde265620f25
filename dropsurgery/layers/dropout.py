"""Dropout as Gaussian noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dropsurgery.errors import ArgumentError
from dropsurgery.survival import check_probability


class GaussianDropout(nn.Module):
    """Multiplicative Gaussian noise with the mean and variance of dropout.

    Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014,
    section 10. In training every unit is multiplied by a draw from N(1, p/(1 - p)), the variance
    of an inverted Bernoulli mask; in eval, and with p = 0, the input itself is returned.

    Args:
        p: the drop probability whose variance is matched, in [0, 1). (At 1 the variance is
            infinite.)
        units: which units share a draw: "element" none, "channel" those of one channel (axes 0
            and 1 draw, the rest share), "row" those of one sample, "batch" all.

    Shape:
        Any floating-point tensor; output the same.
    """

    def __init__(self, p: float = 0.5, units: str = "element") -> None:
        super().__init__()
        self.p = check_probability(p, "p")
        if self.p == 1.0:
            raise ArgumentError("Gaussian dropout has infinite variance at p = 1", fix="p < 1")
        if units not in ("element", "channel", "row", "batch"):
            raise ArgumentError(
                f"unknown units {units!r}", fix="'element', 'channel', 'row' or 'batch'"
            )
        self.units = units

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times noise (training) or as it is (eval)."""
        if not self.training or self.p == 0.0:
            return x
        own = {"element": x.ndim, "channel": 2, "row": 1, "batch": 0}[self.units]
        shape = tuple(size if axis < own else 1 for axis, size in enumerate(x.shape))
        return x * gaussian_noise(x.new_empty(shape), self.p)

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        return f"p={self.p:.4g}, units={self.units!r}"


def gaussian_noise(like: Tensor, p: float) -> Tensor:
    """Return draws from N(1, p/(1 - p)) of the shape, dtype and device of `like`; p in [0, 1)."""
    return torch.randn_like(like).mul_(math.sqrt(p / (1.0 - p))).add_(1.0)
