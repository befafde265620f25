"""What a plan of FoldAffine says beside the moves: plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rewrite:
    """What stands in the place of an affine map.

    Attributes:
        node: its node.
        how: "gone"; "shift" or "scale", a single addition or multiplication; "norm", a BatchNorm
            with another weight and bias; "identity", a drop layer that was passed.
        path: the path of the module that is called now, where there is one.
        ones: how many axes come behind the channels' (of a BatchNorm where that is known).
        dtype: the dtype of what is added or multiplied.
        fresh: nodes that wrote in place and now must not: they would write into what others read.
        dense: whether what the map read has to be made contiguous, as the map's output was.
    """

    node: str
    how: str
    path: str = ""
    ones: int = 0
    dtype: str = ""
    fresh: tuple[str, ...] = ()
    dense: bool = False


@dataclass(frozen=True)
class Write:
    """One set of new weights.

    Attributes:
        nodes: the calls that use it.
        copy_to: path of a new module for it, where the layer's own weights are needed elsewhere.
        border: path of what adds the map of the borders behind it, if there is one.
        size: the spatial sizes of the input that the map is for.
        adds: whether it needs a bias; a layer that has none gets none where it does not.
    """

    nodes: tuple[str, ...]
    copy_to: str = ""
    border: str = ""
    size: tuple[int, ...] = ()
    adds: bool = True
