"""torch's dropout layers, with a generator of their own and no silent change of axes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dropsurgery.layers.noise import check_generator, check_input, check_rate, drop


class _Seeded(nn.modules.dropout._DropoutNd):
    """What the layers here add to torch's: a checked rate below 1, and a generator."""

    generator: torch.Generator | None

    def __init__(self, p: float = 0.5, *, generator: torch.Generator | None = None) -> None:
        super().__init__(check_rate(p))
        self.generator = check_generator(generator)


class Dropout(_Seeded, nn.Dropout):
    """Inverted dropout of single elements.

    Hinton et al., "Improving neural networks by preventing co-adaptation of feature detectors",
    2012, arXiv:1207.0580, scaled in training. In training every element is zero with probability
    `p` and divided by 1 - p otherwise; in eval, and with p = 0, the input itself is returned. On a
    CPU and in compiled code the draws are not those that torch's layer makes from the same seed.

    Args:
        p: drop probability, in [0, 1).
        generator: where the draws come from; None for the global generator.

    Shape:
        Any floating-point tensor; output the same.

    Raises:
        ArgumentError, ArgumentTypeError: p outside [0, 1), no generator; in training, an input
            that is not floating point.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` with elements dropped (training) or as it is (eval)."""
        if not self.training or self.p == 0.0:
            return input
        check_input(input, self)
        return drop(input, tuple(input.shape), self.p, self.generator)


class Dropout1d(_Seeded, nn.Dropout1d):
    """Inverted dropout of whole channels of (N, C, L).

    Tompson et al., "Efficient Object Localization Using Convolutional Networks", 2015,
    arXiv:1411.4280. As `Dropout`, with one draw for each channel of each sample. Unlike torch's,
    the layers of this family take no other rank: torch's `Dropout2d` reads a 3-axis input as
    `Dropout1d` does.

    Args:
        p: drop probability, in [0, 1).
        generator: where the draws come from; None for the global generator.

    Shape:
        (N, C, L), floating point; output the same.

    Raises:
        ArgumentError, ArgumentTypeError: p outside [0, 1), no generator; in training, an input of
            another rank or not of floating point.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` with channels dropped (training) or as it is (eval)."""
        return _drop_channels(self, input, 3, self.generator)


class Dropout2d(_Seeded, nn.Dropout2d):
    """Inverted dropout of whole channels of (N, C, H, W); see `Dropout1d`.

    Args:
        p: drop probability, in [0, 1).
        generator: where the draws come from; None for the global generator.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` with channels dropped (training) or as it is (eval)."""
        return _drop_channels(self, input, 4, self.generator)


class Dropout3d(_Seeded, nn.Dropout3d):
    """Inverted dropout of whole channels of (N, C, D, H, W); see `Dropout1d`.

    Args:
        p: drop probability, in [0, 1).
        generator: where the draws come from; None for the global generator.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` with channels dropped (training) or as it is (eval)."""
        return _drop_channels(self, input, 5, self.generator)


def _drop_channels(
    layer: nn.modules.dropout._DropoutNd, x: Tensor, rank: int, generator: torch.Generator | None
) -> Tensor:
    if not layer.training or layer.p == 0.0:
        return x
    check_input(x, layer, (rank,))
    return drop(x, (*x.shape[:2], *(1,) * (rank - 2)), layer.p, generator)
