"""In which dtype an affine map and what takes it in compute."""

from __future__ import annotations

import torch
from torch import fx

from dropsurgery.graph.affine import Refused
from dropsurgery.graph.channel_maps import ChannelMap
from dropsurgery.graph.ledger import MapState
from dropsurgery.graph.rounding import HALF
from dropsurgery.graph.transfer import Scene, Spread


def common_dtype(
    scene: Scene, state: MapState, spread: Spread, forward: bool
) -> torch.dtype | None:
    """Return the dtype of all that takes part in a move.

    Raises:
        Refused: it is not one, or not on one device.
    """
    maps, nodes = scene.ledger.maps, scene.ledger.nodes
    norm = state.read.norm
    dtypes, devices = set[torch.dtype](), set[torch.device]()
    for name, _ in spread.deposits:
        carrier = None if name in maps else scene.carrier(nodes[name])
        other = maps[name].read.norm if name in maps else None
        for tensor in () if carrier is None else carrier.tensors:
            dtypes.add(tensor.dtype)
            devices.add(tensor.device)
        for tensor in () if other is None else other.tensors:
            devices.add(tensor.device)
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise Refused(f"it would go into layers of {names}")
    dtype = next(iter(dtypes), None)
    if norm is not None:
        devices |= {tensor.device for tensor in norm.tensors}
        own = {tensor.dtype for tensor in norm.tensors}
        half = dtype in HALF and own == {torch.float32}
        if dtype is not None and own != {dtype} and (norm.promotes or not half):
            names = ", ".join(sorted(str(kind) for kind in own))
            raise Refused(f"the layers are {dtype} and the statistics are {names}")
        dtype = dtype or _known_dtype(state.read, own)
    elif dtype is not None:
        _check_constant(state.read, dtype, forward)
    if len(devices) > 1:
        raise Refused("it is not on the device of the layers")
    if dtype is None:
        raise Refused("the dtype of its input is not known: trace with example inputs")
    return dtype


def _known_dtype(read: ChannelMap, own: set[torch.dtype]) -> torch.dtype | None:
    """Return the dtype of a BatchNorm's input, which float32 statistics do not tell."""
    known = getattr(read.data.meta.get("tensor_meta"), "dtype", None)
    if known is None and own != {torch.float32}:
        (known,) = own
    return known


def check_identity(node: fx.Node, read: ChannelMap) -> None:
    """Raise Refused where a map that changes no value may change the dtype."""
    if read.norm is not None and not read.norm.promotes:
        return
    metas = [value.meta.get("tensor_meta") for value in (node, read.data)]
    before, after = (getattr(meta, "dtype", None) for meta in metas)
    if before is None or before != after:
        raise Refused("the dtype of its input is not known: trace with example inputs")


def _check_constant(read: ChannelMap, dtype: torch.dtype, forward: bool) -> None:
    """Raise Refused where a constant may change the dtype of what it is joined to."""
    if read.dtype is not None and read.dtype != dtype:
        raise Refused(f"the layers are {dtype} and the constant is {read.dtype}")
    meta = read.data.meta.get("tensor_meta")
    known = getattr(meta, "dtype", None)
    if known != dtype and (forward or known is not None):
        raise Refused("the dtype of its input is not known: trace with example inputs")
