"""Cutout: one square of each training image set to zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dropsurgery.errors import ArgumentError, ArgumentTypeError
from dropsurgery.layers.noise import check_generator, check_input, uniform
from dropsurgery.survival import check_probability


class Cutout(nn.Module):
    """Sets a square region of each image to zero, in training only.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout",
    2017, arXiv:1708.04552. In training the centre of a square is drawn uniformly over the pixels of
    each image, and what of the square lies inside the image is set to `value`. Nothing is scaled.
    In eval, and with p = 0, the input itself is returned.

    The square is clipped at the border, so that less than size² pixels are cut: of an axis of n
    pixels, the square covers on average the mean over the centres c = 0 … n - 1 of the length of
    [c - ⌊size/2⌋, c - ⌊size/2⌋ + size) inside [0, n), and the two axes are independent; see
    `mean_area`. (On 32 by 32 images, 16 cuts 196 pixels on average, and not 256.) Images are to
    be normalised before, so that 0 is the mean.

    Args:
        size: edge of the square in pixels (the paper: 16 for CIFAR-10, 8 for CIFAR-100, 20 for
            SVHN).
        p: probability of cutting an image, in [0, 1].
        value: what is written into the square.
        generator: where the draws come from; None for the global generator.

    Shape:
        (N, C, H, W), floating point; output the same.

    Raises:
        ArgumentError, ArgumentTypeError: a size below 1, p outside [0, 1], no generator; in
            training, an input of another rank or not of floating point.
    """

    generator: torch.Generator | None

    def __init__(
        self,
        size: int = 16,
        p: float = 1.0,
        *,
        value: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if type(size) is not int:
            raise ArgumentTypeError(f"size must be an int, got {size!r}")
        if size < 1:
            raise ArgumentError(f"size must be 1 or more, got {size}")
        self.size = size
        self.p = check_probability(p, "p")
        self.value = float(value)
        self.generator = check_generator(generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with a square cut out of each image (training) or as it is (eval)."""
        if not self.training or self.p == 0.0:
            return x
        check_input(x, self, (4,))
        draws = uniform(x, (3, x.shape[0]), self.generator)
        cut = (draws[2] < self.p).view(-1, 1, 1, 1)
        rows = self._covered(draws[0], x.shape[2]).view(x.shape[0], 1, -1, 1)
        columns = self._covered(draws[1], x.shape[3]).view(x.shape[0], 1, 1, -1)
        return torch.where(rows & columns & cut, self.value, x)

    def _covered(self, draws: Tensor, length: int) -> Tensor:
        """Return (N, length): which pixels of an axis the squares cover."""
        first = (draws * length).floor() - self.size // 2
        pixels = torch.arange(length, device=draws.device, dtype=draws.dtype)
        distance = pixels - first.unsqueeze(1)
        return (distance >= 0) & (distance < self.size)

    def mean_area(self, height: int, width: int) -> float:
        """Return the expected number of pixels that are cut from a image of that size."""
        area = self.p
        for length in (height, width):
            before = self.size // 2
            spans = (
                min(length, c - before + self.size) - max(0, c - before) for c in range(length)
            )
            area *= sum(spans) / length
        return area

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        return f"size={self.size}, p={self.p:.4g}, value={self.value:.4g}"
