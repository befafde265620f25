"""What is left of a BatchNorm whose other part moved into the weights around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelShift(nn.Module):
    """Add a constant to every channel: a BatchNorm whose scale went into other weights.

    The same in training and in eval.

    Args:
        shift: what is added, in a shape that broadcasts with the input: (C, 1, 1) for images.

    Shape:
        Any that `shift` broadcasts with; output the same.
    """

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift, requires_grad=shift.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + shift."""
        return torch.add(x, self.shift)

    def extra_repr(self) -> str:
        """Return the shape for `repr`."""
        return str(tuple(self.shift.shape))


class ChannelScale(nn.Module):
    """Multiply every channel with a constant: a BatchNorm whose shift went into other weights.

    The same in training and in eval.

    Args:
        scale: the factor, in a shape that broadcasts with the input: (C, 1, 1) for images.

    Shape:
        Any that `scale` broadcasts with; output the same.
    """

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale, requires_grad=scale.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Return x · scale."""
        return torch.mul(x, self.scale)

    def extra_repr(self) -> str:
        """Return the shape for `repr`."""
        return str(tuple(self.scale.shape))
