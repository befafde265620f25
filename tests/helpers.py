"""Networks with random statistics: default BatchNorm statistics hide bugs."""

from __future__ import annotations

import torch
from torch import nn


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm-like module random statistics and affine terms, in place.

    Each layer's draw depends only on `seed` and on its position among the layers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        values = torch.rand(like.shape, generator=generator) * (high - low) + low
        return values.to(like.dtype)

    with torch.no_grad():
        for module in model.modules():
            mean = getattr(module, "running_mean", None)
            if not isinstance(mean, torch.Tensor):
                continue
            mean.copy_(draw(mean, -0.2, 0.2))
            module.running_var.copy_(draw(mean, 0.5, 1.5))
            if getattr(module, "weight", None) is not None:
                module.weight.copy_(draw(mean, 0.7, 1.3))
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(draw(mean, -0.2, 0.2))
    return model
