"""Dropout as it was first written: scaled in eval, not in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dropsurgery.layers.noise import (
    check_generator,
    check_input,
    check_rate,
    check_units,
    kept,
    noise_shape,
)


class ClassicDropout(nn.Module):
    """Dropout in the form of its first paper: a mask in training, a factor in eval.

    Hinton et al., "Improving neural networks by preventing co-adaptation of feature detectors",
    2012, arXiv:1207.0580. In training every unit is zero with probability `p` and *unchanged*
    otherwise; in eval it is multiplied by 1 - p. This layer is therefore not the identity in eval:
    putting it into a trained network changes what the network computes, unless the next weights
    are divided by 1 - p. With p = 0 the input itself is returned.

    Args:
        p: drop probability, in [0, 1).
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
        self.p = check_rate(p)
        self.units = check_units(units)
        self.generator = check_generator(generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` masked (training) or times 1 - p (eval)."""
        if self.p == 0.0:
            return x
        if not self.training:
            return x * (1.0 - self.p)
        check_input(x, self)
        mask = kept(x, noise_shape(x, self.units), self.p, self.generator)
        return x * mask.to(x.dtype)

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        return f"p={self.p:.4g}, units={self.units!r}"
