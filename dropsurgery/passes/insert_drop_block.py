"""DropBlock into a network that was built without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from dropsurgery.errors import ArgumentError
from dropsurgery.graph.channels import Shapes, traced_shape
from dropsurgery.layers.drop_block import DropBlock2d, DropBlock3d
from dropsurgery.layers.noise import check_rate
from dropsurgery.passes.insert_base import Insertion, Unusable
from dropsurgery.passes.insert_choice import Found
from dropsurgery.passes.insert_dropout import spatial_axes


@dataclass(frozen=True)
class InsertDropBlock(Insertion):
    """Put DropBlock before or after chosen layers: `ds.layers.DropBlock2d` or `DropBlock3d`.

    The eval output stays bit-identical and the state-dict keys stay the same. `ds.RemoveDrops()`
    takes it out again.

    Args:
        p: share of units to drop, in [0, 1); `ds.RateSchedule` brings it up from 0.
        block_size: edge of a block.
        per_channel: whether each channel has blocks of its own.

    The other arguments choose the places; see `Insertion`. Without any, after each activation.

    Raises:
        ArgumentError, ArgumentTypeError: p outside [0, 1), a block size that is none.
        PassError: no layer matches, or none of them is proved to be (N, C, H, W) or
            (N, C, D, H, W); or the network's training graph could not be traced.
    """

    p: float = 0.1
    block_size: int = 7
    per_channel: bool = True

    layer_name: ClassVar[str] = "drop_block"
    usual: ClassVar[str | None] = "activation"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "p", check_rate(self.p))
        if type(self.block_size) is not int or self.block_size < 1:
            raise ArgumentError(f"block_size must be an int of 1 or more, got {self.block_size!r}")

    def layer(self, form: int) -> nn.Module:
        """Return a new layer over so many spatial axes."""
        cls = DropBlock2d if form == 2 else DropBlock3d
        return cls(self.p, self.block_size, per_channel=self.per_channel)

    def form_at(
        self, module: fx.GraphModule, shapes: Shapes, spot: Found, node: fx.Node, value: fx.Node
    ) -> int:
        """Return how many spatial axes the layer is to take."""
        try:
            axes = spatial_axes(module, shapes, value, (2, 3))
        except Unusable as reason:
            raise Unusable(f"it is no feature map: {reason}") from None
        shape = traced_shape(value)
        if shape is not None and set(shape[2:]) == {1}:
            raise Unusable("it is no feature map but a single pixel")
        return axes
