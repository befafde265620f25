"""Dropout into a network that was built without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import fx, nn

from dropsurgery.errors import ArgumentError
from dropsurgery.graph.channel_first import carries_channels
from dropsurgery.graph.channels import Shapes
from dropsurgery.layers.classic_dropout import ClassicDropout
from dropsurgery.layers.dropout import GaussianDropout
from dropsurgery.layers.noise import check_rate
from dropsurgery.layers.seeded_dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from dropsurgery.layers.uniform_dropout import UniformDropout
from dropsurgery.passes.insert_base import Insertion, Unusable
from dropsurgery.passes.insert_choice import Found

Kind = Literal["bernoulli", "classic", "gaussian", "uniform"]
Dims = Literal[0, 1, 2, 3, "auto"]

_BY_DIMS: tuple[type[nn.Module], ...] = (Dropout, Dropout1d, Dropout2d, Dropout3d)
_NOISES: dict[str, Callable[[float, str], nn.Module]] = {
    "classic": ClassicDropout,
    "gaussian": GaussianDropout,
    "uniform": UniformDropout.matching,
}


@dataclass(frozen=True)
class InsertDropout(Insertion):
    """Put dropout before or after chosen layers.

    The eval output stays bit-identical (but for kind "classic", which scales in eval) and the
    state-dict keys stay the same. `ds.RemoveDrops()` takes it out again.

    Args:
        p: drop probability, in [0, 1); for "gaussian" and "uniform", of the dropout whose variance
            the noise has.
        kind: "bernoulli" is inverted dropout; "classic", "gaussian" and "uniform" are
            `ds.layers.ClassicDropout`, `GaussianDropout` and `UniformDropout`.
        dims: 0 drops single elements; 1, 2 and 3 whole channels of a tensor with that many spatial
            axes, (N, C, L), (N, C, H, W) and (N, C, D, H, W). "auto" drops whole channels where
            the tensor has spatial axes and elements where it is (N, C). Rank and channel axis are
            proved: from `example_inputs`, or from the layers around.

    The other arguments choose the places; see `Insertion`.

    Raises:
        ArgumentError, ArgumentTypeError: p outside [0, 1), an unknown kind or dims, no place.
        PassError: no layer matches, or at none of them the rank can be proved; or the network's
            training graph could not be traced.
    """

    p: float = 0.5
    kind: Kind = "bernoulli"
    dims: Dims = 0

    layer_name: ClassVar[str] = "dropout"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "p", check_rate(self.p))
        if self.kind not in get_args(Kind):
            known = ", ".join(map(repr, get_args(Kind)))
            raise ArgumentError(f"unknown kind {self.kind!r}", fix=f"one of {known}")
        if isinstance(self.dims, bool) or self.dims not in get_args(Dims):
            raise ArgumentError(f"unknown dims {self.dims!r}", fix="0, 1, 2, 3 or 'auto'")

    def layer(self, form: int) -> nn.Module:
        """Return a new layer over so many spatial axes."""
        if self.kind == "bernoulli":
            return _BY_DIMS[form](self.p)
        return _NOISES[self.kind](self.p, "channel" if form else "element")

    def form_at(
        self, module: fx.GraphModule, shapes: Shapes, spot: Found, node: fx.Node, value: fx.Node
    ) -> int:
        """Return how many spatial axes the layer is to take."""
        if self.dims == 0:
            return 0
        wanted = (1, 2, 3) if self.dims == "auto" else (self.dims,)
        if self.dims == "auto" and shapes.rank(value) == 2:
            return 0
        return spatial_axes(module, shapes, value, wanted)


def spatial_axes(
    module: fx.GraphModule, shapes: Shapes, value: fx.Node, wanted: tuple[int, ...]
) -> int:
    """Return how many axes follow the channels of a value, if it is one of `wanted`.

    Raises:
        Unusable: the rank is another, or is not proved, or axis 1 is not proved to be channels.
    """
    rank = shapes.rank(value)
    if rank is None:
        raise Unusable("its rank is not proved (example_inputs would tell)")
    if rank - 2 not in wanted:
        ranks = " or ".join(str(axes + 2) for axes in wanted)
        raise Unusable(f"it is of rank {rank}, where rank {ranks} is needed")
    first = carries_channels(module, shapes, value, 1)
    if first is None:
        raise Unusable("which of its axes carries the channels is not proved")
    if not first:
        raise Unusable("its channels are not on axis 1")
    return rank - 2
