"""Stochastic layers: what surgery puts into a network."""

from dropsurgery.layers.attention import GaussianMultiheadAttention, ScaledDotProductAttention
from dropsurgery.layers.drop_path import DropPath
from dropsurgery.layers.dropout import GaussianDropout
from dropsurgery.layers.functions import Apply, FollowTraining

__all__ = [
    "Apply",
    "DropPath",
    "FollowTraining",
    "GaussianDropout",
    "GaussianMultiheadAttention",
    "ScaledDotProductAttention",
]
