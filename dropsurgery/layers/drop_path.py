"""Stochastic depth as a layer."""

from __future__ import annotations

from typing import Literal, cast, get_args

from torch import Tensor, nn

from dropsurgery.errors import ArgumentError
from dropsurgery.survival import check_probability

Mode = Literal["row", "batch"]


def check_mode(mode: str) -> Mode:
    """Return `mode`, or raise where it names no way of drawing."""
    if mode not in get_args(Mode):
        raise ArgumentError(
            f"unknown mode {mode!r}", fix=f"one of {', '.join(map(repr, get_args(Mode)))}"
        )
    return cast(Mode, mode)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch, for some samples or for a whole mini-batch.

    Huang et al., "Deep Networks with Stochastic Depth", 2016, arXiv:1603.09382; with inverted
    scaling, so that a network's eval output does not depend on the rate.

    In training the input is multiplied by a mask that is 0 with probability `drop_prob` and
    1/(1 - drop_prob) otherwise, drawn from the global generator of the input's device just as
    timm draws it: the same seed gives the same output. In eval, and with `drop_prob` 0, the input
    itself is returned. With `drop_prob` 1 the output in training is zero.

    Args:
        drop_prob: probability of dropping, in [0, 1]; one minus the survival probability.
        mode: "row" draws once for every sample (the leading axis), "batch" once for all of them.

    Shape:
        Any floating-point tensor of rank 1 or more, leading axis the batch; output the same.

    Raises:
        ArgumentError: `drop_prob` outside [0, 1], an unknown mode, or (in training) an input of
            rank 0 or of a dtype that is not floating point.
    """

    def __init__(self, drop_prob: float = 0.0, mode: Mode = "row") -> None:
        super().__init__()
        self.drop_prob = check_probability(drop_prob, "drop_prob")
        self.mode = check_mode(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with its branch dropped (training) or as it is (eval)."""
        if not self.training or self.drop_prob == 0.0:
            return x
        if x.ndim == 0 or not x.is_floating_point():
            raise ArgumentError(
                f"DropPath needs a floating-point tensor with a batch axis, got {x.dtype} of "
                f"shape {tuple(x.shape)}"
            )
        keep = 1.0 - self.drop_prob
        rows = x.shape[0] if self.mode == "row" else 1
        mask = x.new_empty((rows,) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        if keep > 0.0:
            mask.div_(keep)
        return x * mask

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        return f"drop_prob={self.drop_prob:.4g}, mode={self.mode!r}"
