"""Weighted Channel Dropout into a network that was built without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from dropsurgery.graph.channels import Shapes
from dropsurgery.layers.noise import check_rate
from dropsurgery.layers.weighted_channel_dropout import WeightedChannelDropout
from dropsurgery.passes.insert_base import Insertion, Unusable
from dropsurgery.passes.insert_choice import Found
from dropsurgery.passes.insert_dropout import spatial_axes

# Activations whose output is 0 or more, as the scores of the channels are to be.
_NON_NEGATIVE = frozenset({"ReLU", "ReLU6", "Sigmoid", "Hardsigmoid", "Softplus"})


@dataclass(frozen=True)
class InsertWeightedChannelDropout(Insertion):
    """Put `ds.layers.WeightedChannelDropout` after chosen activations.

    The eval output stays bit-identical and the state-dict keys stay the same. `ds.RemoveDrops()`
    takes it out again.

    Args:
        p: share of the channels that are left out by weight, in [0, 1).
        random_p: probability with which a chosen channel is dropped all the same, in [0, 1).
        signed: insert also behind what can be negative; a negative score counts as 0.

    The other arguments choose the places; see `Insertion`. Without any, after each activation.

    Raises:
        ArgumentError, ArgumentTypeError: a probability outside [0, 1).
        PassError: no layer matches, or none of them is proved to be (N, C, …) with spatial axes
            and, without `signed`, 0 or more; or the training graph could not be traced.
    """

    p: float = 0.2
    random_p: float = 0.0
    signed: bool = False

    layer_name: ClassVar[str] = "channel_dropout"
    usual: ClassVar[str | None] = "activation"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "p", check_rate(self.p))
        object.__setattr__(self, "random_p", check_rate(self.random_p, "random_p"))

    def layer(self, form: int) -> nn.Module:
        """Return a new layer; it takes any number of spatial axes."""
        return WeightedChannelDropout(self.p, self.random_p)

    def form_at(
        self, module: fx.GraphModule, shapes: Shapes, spot: Found, node: fx.Node, value: fx.Node
    ) -> int:
        """Return how many spatial axes the layer is to take."""
        positive = self.before is None and spot.spot.kinds & _NON_NEGATIVE
        if not self.signed and not positive:
            raise Unusable("it can be negative, and channels are weighted by their mean (signed)")
        return spatial_axes(module, shapes, value, (1, 2, 3))
