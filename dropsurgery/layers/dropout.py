"""Dropout as Gaussian noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dropsurgery.errors import ArgumentError
from dropsurgery.layers.noise import check_generator, check_input, check_units, noise_shape
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
        generator: where the draws come from; None for the global generator.

    Shape:
        Any floating-point tensor; output the same.

    Raises:
        ArgumentError, ArgumentTypeError: p outside [0, 1), unknown units, no generator; in
            training, an input that is not floating point.
    """

    generator: torch.Generator | None

    def __init__(
        self,
        p: float = 0.5,
        units: str = "element",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.p = check_probability(p, "p")
        if self.p == 1.0:
            raise ArgumentError("Gaussian dropout has infinite variance at p = 1", fix="p < 1")
        self.units = check_units(units)
        self.generator = check_generator(generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times noise (training) or as it is (eval)."""
        if not self.training or self.p == 0.0:
            return x
        check_input(x, self)
        shape = noise_shape(x, self.units)
        empty = torch.empty_like(x) if shape == tuple(x.shape) else x.new_empty(shape)
        return x * _noise(empty, self.p, self.generator)

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        return f"p={self.p:.4g}, units={self.units!r}"


def gaussian_noise(like: Tensor, p: float) -> Tensor:
    """Return draws from N(1, p/(1 - p)) of the shape, dtype and device of `like`; p in [0, 1)."""
    return _noise(torch.empty_like(like), p, None)


def _noise(empty: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Fill a tensor with draws from N(1, p/(1 - p))."""
    with torch.no_grad():
        return empty.normal_(generator=generator).mul_((p / (1.0 - p)) ** 0.5).add_(1.0)
