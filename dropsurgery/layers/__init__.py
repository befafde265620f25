"""Stochastic layers: what surgery puts into a network."""

from dropsurgery.layers.attention import GaussianMultiheadAttention, ScaledDotProductAttention
from dropsurgery.layers.drop_path import DropPath
from dropsurgery.layers.dropout import FollowTraining, GaussianDropout

__all__ = [
    "DropPath",
    "FollowTraining",
    "GaussianDropout",
    "GaussianMultiheadAttention",
    "ScaledDotProductAttention",
]
