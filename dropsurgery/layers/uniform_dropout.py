"""Dropout as uniform noise: Uout."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn

from dropsurgery.errors import ArgumentError, ArgumentTypeError
from dropsurgery.layers.noise import (
    Units,
    check_generator,
    check_input,
    check_rate,
    check_units,
    noise_shape,
    uniform,
)


class UniformDropout(nn.Module):
    """Uout: multiplicative uniform noise, y = x·(1 + r) with r ~ U(-β, β).

    Li et al., "Understanding the Disharmony between Dropout and Batch Normalization by Variance
    Shift", 2018, arXiv:1801.05134, section 5. Its variance, β²/3 in the factor, shifts the
    statistics of a later BatchNorm far less than dropout's does at the β of the paper (0.1). In
    training every unit is multiplied by a draw from U(1 - β, 1 + β); in eval, and with β = 0, the
    input itself is returned.

    Args:
        beta: half the width of the noise, 0 or more. Above 1 some factors are negative.
        units: which units share a draw: "element" none, "channel" those of one channel (axes 0
            and 1 draw, the rest share), "row" those of one sample, "batch" all.
        generator: where the draws come from; None for the global generator.

    Attributes:
        p: the drop probability of the dropout with the same variance, p/(1 - p) = β²/3. It is
            what is stored, and what schedules set; `beta` follows it.

    Shape:
        Any floating-point tensor; output the same.

    Raises:
        ArgumentError, ArgumentTypeError: a beta that is no number of 0 or more, unknown units, no
            generator; in training, an input that is not floating point.
    """

    p: float
    units: Units
    generator: torch.Generator | None

    def __init__(
        self,
        beta: float = 0.1,
        units: str = "element",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(beta, bool) or not isinstance(beta, Real):
            raise ArgumentTypeError(f"beta must be a number, got {beta!r}")
        if not 0.0 <= float(beta) < math.inf:
            raise ArgumentError(f"beta must be 0 or more, got {beta!r}")
        variance = float(beta) ** 2 / 3.0
        self.p = variance / (1.0 + variance)
        self.units = check_units(units)
        self.generator = check_generator(generator)

    @classmethod
    def matching(
        cls, p: float, units: str = "element", *, generator: torch.Generator | None = None
    ) -> UniformDropout:
        """Return the layer whose noise has the variance of dropout with probability `p`."""
        layer = cls(0.0, units, generator=generator)
        layer.p = check_rate(p)
        return layer

    @property
    def beta(self) -> float:
        """Half the width of the noise: √(3p/(1 - p))."""
        return float((3.0 * self.p / (1.0 - self.p)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times noise (training) or as it is (eval)."""
        if not self.training or self.p == 0.0:
            return x
        check_input(x, self)
        # Not `self.beta`: a float() would be a constant in compiled code.
        beta = (3.0 * self.p / (1.0 - self.p)) ** 0.5
        draws = uniform(x, noise_shape(x, self.units), self.generator)
        factor = draws.mul_(2.0 * beta).add_(1.0 - beta)
        return (x * factor).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        return f"beta={self.beta:.4g}, units={self.units!r}"
