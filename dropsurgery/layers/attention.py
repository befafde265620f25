"""Attention whose dropout follows `train()` and `eval()`, Bernoulli or Gaussian."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropsurgery.errors import ArgumentError
from dropsurgery.layers.dropout import gaussian_noise
from dropsurgery.survival import check_probability

Noise = Literal["bernoulli", "gaussian"]


class ScaledDotProductAttention(nn.Module):
    """`F.scaled_dot_product_attention` with dropout on the attention weights in training only.

    Args:
        dropout_p: probability of dropping an attention weight in training, in [0, 1].
        noise: "bernoulli" is torch's inverted dropout; "gaussian" multiplies the weights by
            N(1, p/(1 - p)) instead, for which they are computed explicitly.

    Shape:
        As `torch.nn.functional.scaled_dot_product_attention`: query (N, …, L, E), key
        (N, …, S, E), value (N, …, S, Ev); output (N, …, L, Ev).

    Raises:
        ArgumentError: a probability outside [0, 1], or 1 with Gaussian noise.
    """

    def __init__(self, dropout_p: float = 0.0, noise: Noise = "bernoulli") -> None:
        super().__init__()
        self.dropout_p = check_probability(dropout_p, "dropout_p")
        if noise not in ("bernoulli", "gaussian"):
            raise ArgumentError(f"unknown noise {noise!r}", fix="'bernoulli' or 'gaussian'")
        if noise == "gaussian" and dropout_p == 1.0:
            raise ArgumentError("Gaussian dropout has infinite variance at p = 1", fix="p < 1")
        self.noise = noise

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return attention of `query` over `key` and `value`; the arguments are torch's."""
        if not self.is_noisy():
            dropout_p = self.dropout_p if self.training else 0.0
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key = key.repeat_interleave(groups, -3)
            value = value.repeat_interleave(groups, -3)
        if is_causal:
            length = (query.shape[-2], key.shape[-2])
            attn_mask = torch.ones(length, dtype=torch.bool, device=query.device).tril()
        weights = _weights(query, key, attn_mask, scale)
        return (weights * self.noise_like(weights)) @ value

    def is_noisy(self) -> bool:
        """Say whether the weights are multiplied by noise, which no fused kernel does."""
        return self.training and self.noise == "gaussian" and self.dropout_p > 0.0

    def noise_like(self, weights: Tensor) -> Tensor:
        """Return the factors of the attention weights."""
        return gaussian_noise(weights, self.dropout_p)

    def extra_repr(self) -> str:
        """Return the parameters for `repr`."""
        return f"dropout_p={self.dropout_p:.4g}, noise={self.noise!r}"


class GaussianMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose dropout multiplies the weights by N(1, p/(1 - p)).

    Parameters, state-dict keys, arguments and eval behaviour are those of
    `nn.MultiheadAttention`, into which an existing layer is turned by changing its class.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return attended values, and the weights where asked, as `nn.MultiheadAttention`."""
        if not self.is_noisy():
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        output, weights = self._attend(query, key, value, key_padding_mask, attn_mask)
        if not batched:
            output, weights = output.squeeze(0), weights.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        return output, weights.mean(dim=-3) if average_attn_weights else weights

    def is_noisy(self) -> bool:
        """Say whether the weights are multiplied by noise."""
        return self.training and self.dropout > 0.0

    def noise_like(self, weights: Tensor) -> Tensor:
        """Return the factors of the attention weights."""
        return gaussian_noise(weights, self.dropout)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attend with noise; all of shape (N, L, E), weights of shape (N, heads, L, S)."""
        q, k, v = (
            F.linear(x, weight, bias)
            for x, (weight, bias) in zip((query, key, value), self._projections(), strict=True)
        )
        count = q.shape[0]  # len() would fix the batch of an exported graph
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(count, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(count, 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = _weights(q, k, mask, None)
        weights = weights * self.noise_like(weights)
        output: Tensor = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        return output, weights

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return list(zip(weights, biases, strict=True))

    def _mask(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """Return both masks as one additive mask that broadcasts over (N, heads, L, S)."""
        parts = []
        if attn_mask is not None:
            per_head = attn_mask.dim() == 3
            parts.append(attn_mask.unflatten(0, (q.shape[0], -1)) if per_head else attn_mask)
        if key_padding_mask is not None:
            parts.append(key_padding_mask[:, None, None, :])
        total: Tensor | None = None
        for part in parts:
            added = _additive(part, q.dtype)
            # Keys that bias_k and add_zero_attn appended are never masked.
            added = F.pad(added, (0, k.shape[1] - added.shape[-1]))
            total = added if total is None else total + added
        return total


def _weights(query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    """Return softmax(query keyᵀ · scale + mask)."""
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + _additive(attn_mask, scores.dtype, keep=True)
    return scores.softmax(-1)


def _additive(mask: Tensor, dtype: torch.dtype, *, keep: bool = False) -> Tensor:
    """Return a mask to add to scores; a boolean one means "attend" if `keep`, else "ignore"."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    ignored = ~mask if keep else mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(ignored, -math.inf)
