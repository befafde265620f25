"""Weighted Channel Dropout: channels kept by how strongly they respond."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dropsurgery.layers.noise import check_generator, check_input, check_rate, kept, uniform


class WeightedChannelDropout(nn.Module):
    """Keeps channels at random, the stronger the likelier, sample by sample.

    Hou and Wang, "Weighted Channel Dropout for Regularization of Deep Convolutional Neural
    Network", AAAI 2019. In training, for each sample:

    1. the score of channel i is its mean over space (global average pooling);
    2. M = (1 - p)·C channels (rounded, at least one) are drawn without replacement with weights
       that are the scores: those with the largest r_i^(1/score_i), r_i ~ U(0, 1);
    3. of these, each is dropped all the same with probability `random_p` (the paper's random
       number generator, for high layers where few channels respond);
    4. what is kept is multiplied by Σ scores / Σ kept scores, so that the sum of the scores stays
       what it was.

    The draw and that factor count as constants in the backward pass. In eval, and with both
    probabilities 0, the input itself is returned.

    Scores are to be 0 or more, as they are behind a ReLU; a negative one counts as 0, and its
    channel is kept only where nothing else is left.

    Args:
        p: share of the channels that step 2 leaves out (1 - p is the paper's wrs_ratio), in
            [0, 1).
        random_p: probability of step 3, in [0, 1).
        generator: where the draws come from; None for the global generator.

    Shape:
        (N, C, …) with at least one spatial axis, floating point; output the same.

    Raises:
        ArgumentError, ArgumentTypeError: a probability outside [0, 1), no generator; in training,
            an input without spatial axes or not of floating point.
    """

    generator: torch.Generator | None

    def __init__(
        self,
        p: float = 0.2,
        random_p: float = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.p = check_rate(p)
        self.random_p = check_rate(random_p, "random_p")
        self.generator = check_generator(generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with channels dropped (training) or as it is (eval)."""
        if not self.training or (self.p == 0.0 and self.random_p == 0.0):
            return x
        check_input(x, self, (3, 4, 5))
        with torch.no_grad():
            factor = self._factor(x)
        factor = factor.view(*factor.shape, *(1,) * (x.ndim - 2))
        return x * factor.to(x.dtype)

    def _factor(self, x: Tensor) -> Tensor:
        """Return (N, C): the factor of the channels that are kept, 0 for the others."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scores = x.mean(dim=tuple(range(2, x.ndim)), dtype=wide).clamp_min(0.0)
        shape = (x.shape[0], x.shape[1])
        # r^(1/score) is largest where -log(r)/score is smallest; 1 - r is never 0.
        keys = -torch.log1p(-uniform(x, shape, self.generator)) / scores
        keys = torch.where(scores > 0.0, keys, torch.inf)
        ranks = torch.arange(shape[1], device=x.device)
        chosen = (ranks + 0.5 < (1.0 - self.p) * shape[1]) | (ranks == 0)
        mask = torch.zeros_like(keys).scatter(1, keys.argsort(1), chosen.to(wide).expand(shape))
        if self.random_p > 0.0:
            mask = mask * kept(x, shape, self.random_p, self.generator)
        left = (scores * mask).sum(1, keepdim=True)
        alpha = torch.where(left > 0.0, scores.sum(1, keepdim=True) / left, 1.0)
        return mask * alpha

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        return f"p={self.p:.4g}, random_p={self.random_p:.4g}"
