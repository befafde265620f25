"""Stochastic layers: what surgery puts into a network."""

from dropsurgery.layers.drop_path import DropPath
from dropsurgery.layers.dropout import FollowTraining, GaussianDropout, ScaledDotProductAttention

__all__ = ["DropPath", "FollowTraining", "GaussianDropout", "ScaledDotProductAttention"]
