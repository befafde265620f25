"""DropConnect: dropout of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropsurgery.errors import ArgumentError
from dropsurgery.layers.noise import check_generator, check_input, check_rate, drop


class DropConnect(nn.Module):
    """Inverted dropout of the weights of a linear layer or a convolution.

    Wan et al., "Regularization of Neural Networks using DropConnect", ICML 2013: y = (M ⊙ W)·x + b
    with a Bernoulli mask M. The layer takes the *weight* and returns what the operation is to use:
    in training W with every entry zero with probability `p` and divided by 1 - p otherwise, so
    that the output keeps its expectation (the paper instead samples a Gaussian in eval); in eval,
    and with p = 0, the weight itself. The bias is never dropped.

    Args:
        p: drop probability of a weight, in [0, 1).
        per_sample: one mask for each sample, as in the paper, in place of one for the mini-batch;
            the result then has a leading axis and goes to `linear`. It takes N times the memory
            of the weight.
        generator: where the draws come from; None for the global generator.

    Shape:
        weight (any shape, floating point); output the same, or (N, …) per sample.

    Raises:
        ArgumentError, ArgumentTypeError: p outside [0, 1), no generator; in training, a weight
            that is not floating point, or a per-sample call without the samples.
    """

    generator: torch.Generator | None

    def __init__(
        self,
        p: float = 0.5,
        per_sample: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.p = check_rate(p)
        self.per_sample = per_sample
        self.generator = check_generator(generator)

    def forward(self, weight: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the weight with entries dropped (training) or as it is (eval).

        Args:
            weight: the weight.
            x: for `per_sample`, the operation's input (N, …).
        """
        if not self.training or self.p == 0.0:
            return weight
        check_input(weight, self)
        if not self.per_sample:
            return drop(weight, tuple(weight.shape), self.p, self.generator)
        if x is None or x.ndim < 2:
            raise ArgumentError(
                "DropConnect(per_sample=True) needs the input (N, …) beside the weight",
                fix="layer(weight, x)",
            )
        return drop(weight, (x.shape[0], *weight.shape), self.p, self.generator)

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        return f"p={self.p:.4g}" + (", per_sample=True" if self.per_sample else "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x·Wᵀ + b, where each sample may have a weight of its own.

    Args:
        x: (N, …, in).
        weight: (out, in), for which this is `torch.nn.functional.linear`; or (N, out, in).
        bias: (out,), or None.
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    rows = x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)
    y = torch.bmm(rows, weight.transpose(1, 2))
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], weight.shape[1])
