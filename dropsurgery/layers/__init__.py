"""Stochastic layers: what surgery puts into a network."""

from dropsurgery.layers.attention import GaussianMultiheadAttention, ScaledDotProductAttention
from dropsurgery.layers.attentive_cutmix import AttentiveCutMix, Mixed
from dropsurgery.layers.channel import ChannelScale, ChannelShift
from dropsurgery.layers.classic_dropout import ClassicDropout
from dropsurgery.layers.cutout import Cutout
from dropsurgery.layers.drop_block import DropBlock2d, DropBlock3d
from dropsurgery.layers.drop_connect import DropConnect, linear
from dropsurgery.layers.drop_path import DropPath
from dropsurgery.layers.dropout import GaussianDropout
from dropsurgery.layers.functions import Apply, FollowTraining
from dropsurgery.layers.monte_carlo import (
    MonteCarloAttention,
    MonteCarloDropout,
    MonteCarloMultiheadAttention,
)
from dropsurgery.layers.noise import set_generator
from dropsurgery.layers.seeded_dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from dropsurgery.layers.uniform_dropout import UniformDropout
from dropsurgery.layers.weighted_channel_dropout import WeightedChannelDropout

__all__ = [
    "Apply",
    "AttentiveCutMix",
    "ChannelScale",
    "ChannelShift",
    "ClassicDropout",
    "Cutout",
    "DropBlock2d",
    "DropBlock3d",
    "DropConnect",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FollowTraining",
    "GaussianDropout",
    "GaussianMultiheadAttention",
    "Mixed",
    "MonteCarloAttention",
    "MonteCarloDropout",
    "MonteCarloMultiheadAttention",
    "ScaledDotProductAttention",
    "UniformDropout",
    "WeightedChannelDropout",
    "linear",
    "set_generator",
]
