"""Dropout that stays on in eval, in operations that an exported graph keeps."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dropsurgery.errors import ArgumentError
from dropsurgery.layers.attention import GaussianMultiheadAttention, ScaledDotProductAttention
from dropsurgery.layers.noise import Units, check_rate, check_units

Noise = Literal["bernoulli", "gaussian"]


class MonteCarloDropout(nn.Module):
    """Dropout in training *and* in eval, for Monte-Carlo estimates of uncertainty.

    Gal and Ghahramani, "Dropout as a Bayesian Approximation", 2016, arXiv:1506.02142. Every unit is
    multiplied, in either mode, by a draw of mean 1 and variance p/(1 - p): 0 or 1/(1 - p), or
    Gaussian. The draws are made like the input at run time (`rand_like`), so that no exporter takes
    them for constants; ONNX has them as RandomUniformLike or RandomNormalLike, which onnxruntime's
    optimiser keeps where it removes Dropout nodes.

    Args:
        p: drop probability, in [0, 1).
        noise: "bernoulli" or "gaussian".
        units: which units share a draw: "element" none, "channel" those of one channel (axes 0
            and 1 draw, the rest share), "row" those of one sample, "batch" all.

    Shape:
        Any floating-point tensor; output the same.

    Raises:
        ArgumentError, ArgumentTypeError: p outside [0, 1), unknown noise or units.
    """

    def __init__(
        self, p: float = 0.5, noise: Noise = "bernoulli", units: Units = "element"
    ) -> None:
        super().__init__()
        self.p = check_rate(p)
        self.noise = check_noise(noise)
        self.units = check_units(units)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times noise."""
        if self.p == 0.0:
            return x
        own = {"element": x.ndim, "channel": 2, "row": 1, "batch": 0}[self.units]
        like = x.detach()
        for axis in range(own, x.ndim):
            like = like.narrow(axis, 0, 1)
        return (x * factors(like, self.p, self.noise)).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        return f"p={self.p:.4g}, noise={self.noise!r}, units={self.units!r}"


class MonteCarloAttention(ScaledDotProductAttention):
    """`F.scaled_dot_product_attention` with noise on the attention weights in both modes.

    Arguments and shapes are those of `ScaledDotProductAttention`; the weights are computed
    explicitly, since no fused kernel draws in eval.
    """

    def is_noisy(self) -> bool:
        """Say whether the weights are multiplied by noise: whenever there is a rate."""
        return self.dropout_p > 0.0

    def noise_like(self, weights: Tensor) -> Tensor:
        """Return the factors of the attention weights."""
        return factors(weights, self.dropout_p, self.noise).to(weights.dtype)


class MonteCarloMultiheadAttention(GaussianMultiheadAttention):
    """`nn.MultiheadAttention` with noise on the attention weights in both modes.

    An existing layer is turned into one by changing its class and setting `noise`.
    """

    noise: Noise = "bernoulli"

    def is_noisy(self) -> bool:
        """Say whether the weights are multiplied by noise: whenever there is a rate."""
        return self.dropout > 0.0

    def noise_like(self, weights: Tensor) -> Tensor:
        """Return the factors of the attention weights."""
        return factors(weights, self.dropout, self.noise).to(weights.dtype)


def check_noise(noise: str) -> Noise:
    """Return `noise`, or raise where it names no distribution."""
    if noise not in get_args(Noise):
        raise ArgumentError(f"unknown noise {noise!r}", fix="'bernoulli' or 'gaussian'")
    return noise  # type: ignore[return-value]


def factors(like: Tensor, p: float, noise: Noise) -> Tensor:
    """Return draws of mean 1 and variance p/(1 - p) of the shape and device of `like`.

    They are float32 or wider: in half precision, 1 in 256 would be the finest probability.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if noise == "gaussian":
        return torch.randn_like(like, dtype=dtype) * (p / (1.0 - p)) ** 0.5 + 1.0
    kept = torch.rand_like(like, dtype=dtype) >= p
    return kept.to(dtype) * (1.0 / (1.0 - p))
