"""What layers do to the axis of the batch."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from dropsurgery.graph.batch.along import along, last_axis, normalised, trailing, windowed
from dropsurgery.graph.batch.calls import Call, Found, Parts
from dropsurgery.graph.batch.products import attention, embedded
from dropsurgery.graph.batch.rules import rule_of
from dropsurgery.graph.batch.sizes import Size
from dropsurgery.graph.batch.values import Place, State, Value, of_rank, tensor, unknown_rank
from dropsurgery.graph.batch.views import flattened, unflattened
from dropsurgery.graph.drops import is_drop
from dropsurgery.graph.leaves import FROZEN_BATCHNORMS, is_one_of
from dropsurgery.layers.attention import ScaledDotProductAttention
from dropsurgery.layers.functions import FollowTraining

_ACTIVATIONS = tuple(
    value
    for value in vars(nn.modules.activation).values()
    if isinstance(value, type)
    and issubclass(value, nn.Module)
    and value not in (nn.Module, nn.MultiheadAttention, nn.GLU, nn.Softmax, nn.LogSoftmax,
                      nn.Softmin)
)  # fmt: skip
_SAME = (
    *_ACTIVATIONS, nn.Identity, nn.modules.dropout._DropoutNd, _NormBase, _InstanceNorm,
    nn.GroupNorm, nn.LocalResponseNorm, nn.ChannelShuffle,
)  # fmt: skip
_POOLS = {
    getattr(nn, f"{kind}{axes}d"): axes
    for kind in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "LPPool")
    for axes in (1, 2, 3)
}
_PADS = tuple(
    getattr(nn, f"{kind}Pad{axes}d")
    for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")
    for axes in (1, 2, 3)
)
_ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
_DECODERS = (nn.TransformerDecoder, nn.TransformerDecoderLayer)


@lru_cache(maxsize=1024)
def _is_same(kind: type) -> bool:
    return issubclass(kind, _SAME)


def layer_output(call: Call, layer: nn.Module) -> Found:
    """Return what is known of a layer's output."""
    value = call.input
    if value is not None and _is_same(type(layer)):  # type: ignore[arg-type]
        return value
    if value is not None and isinstance(layer, nn.Linear | nn.LayerNorm | nn.modules.conv._ConvNd):
        return _plain(call, layer, value)  # most layers are one of these
    if isinstance(layer, FollowTraining):
        rule = rule_of(layer.function)
        return call.unknown() if rule is None else rule(call)
    if isinstance(layer, ScaledDotProductAttention):
        return attention(call)
    if value is None:
        return call.unknown()
    if isinstance(layer, nn.RNNBase):
        return _recurrent(call, layer, value)
    if isinstance(layer, nn.MultiheadAttention):
        return _multihead(call, layer, value)
    if isinstance(layer, _ENCODERS + _DECODERS):
        return _transformer(call, layer, value)
    return _plain(call, layer, value)


def _plain(call: Call, layer: Any, value: Value) -> Found:
    """Layers of one tensor."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        axes = len(layer.kernel_size)
        return windowed(call, value, axes, Size(layer.out_channels), _kept(layer, value, axes))
    if isinstance(layer, nn.Linear):
        return last_axis(call, value, Size(layer.out_features))
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return normalised(call, value, len(layer.normalized_shape))
    if isinstance(layer, nn.Embedding):
        return embedded(call, value, Size(layer.embedding_dim))
    axes = next((axes for kind, axes in _POOLS.items() if isinstance(layer, kind)), 0)
    if axes:
        found = windowed(call, value, axes, None, [None] * axes)
        return Parts(each=found) if getattr(layer, "return_indices", False) else found
    if isinstance(layer, _PADS):
        return trailing(call, value, len(layer.padding) // 2)
    if isinstance(layer, nn.Flatten):
        return flattened(call, value, layer.start_dim, layer.end_dim)
    if isinstance(layer, nn.Unflatten):
        return unflattened(call, value, layer.dim, call.as_sizes(list(layer.unflattened_size)))
    if isinstance(layer, nn.PixelShuffle | nn.PixelUnshuffle):
        return trailing(call, value, 3)
    if isinstance(layer, nn.Upsample):
        behind = value.place is None or value.place.axis < 2
        return (
            replace(value, name=call.name, sizes=value.sizes[:2], rank=value.rank)
            if (behind and not value.whole)
            else trailing(call, value, len(value.sizes) - 2)
        )
    if isinstance(layer, nn.Softmax | nn.LogSoftmax | nn.Softmin) and layer.dim is not None:
        return along(call, value, (layer.dim,))
    if isinstance(layer, nn.GLU):
        return along(call, value, (layer.dim,), resize=True)
    same = is_drop(layer) or is_one_of(layer, FROZEN_BATCHNORMS)
    return value if same else call.unknown()


def _kept(layer: Any, value: Value, axes: int) -> list[Size | None]:
    """Return the spatial sizes after a convolution, where it keeps them; None where not."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) or not isinstance(layer.padding, tuple):
        same = layer.padding == "same"
        return _spatial(value, axes) if same else [None] * axes
    sizes = zip(
        _spatial(value, axes), layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        strict=True,
    )  # fmt: skip
    return [
        size if stride == 1 and 2 * padding == dilation * (kernel - 1) else None
        for size, kernel, stride, padding, dilation in sizes
    ]


def _spatial(value: Value, axes: int) -> list[Size | None]:
    if not value.whole or len(value.sizes) < axes:
        return [None] * axes
    return list(value.sizes[-axes:])


def _sequence(call: Call, value: Value, batch_first: bool) -> State | None:
    """Return what becomes of a batch that does not stand where a sequence layer takes it to be.

    Along the other axis of the two the entries are attended to, or passed through in turn.
    """
    value = of_rank(call.algebra, value, 3)
    place = value.place
    if place is None:
        return State.BLENDED if value.batch is State.BLENDED else State.UNKNOWN
    if len(value.sizes) == 2:  # one sequence without a batch
        return State.BLENDED if place.axis == 0 else State.UNKNOWN
    wanted = 0 if batch_first else 1
    if place.axis == wanted:
        return None
    return State.BLENDED if place.axis == 1 - wanted else State.UNKNOWN


def _recurrent(call: Call, layer: nn.RNNBase, value: Value) -> Found:
    state = _sequence(call, value, layer.batch_first)
    if state is not None:
        return Parts(each=unknown_rank(call.name, state))
    value = of_rank(call.algebra, value, 3)
    assert value.place is not None
    ways = 2 if layer.bidirectional else 1
    width = layer.proj_size or layer.hidden_size
    output = replace(value, name=call.name, sizes=(*value.sizes[:2], Size(ways * width)))
    layers = Size(layer.num_layers * ways)
    place = replace(value.place, axis=1)
    hidden = tensor(call.name, (layers, place.size, Size(width)), place)
    if isinstance(layer, nn.LSTM):
        cells = replace(hidden, sizes=(layers, place.size, Size(layer.hidden_size)))
        return Parts((output, Parts((hidden, cells))))
    return Parts((output, hidden))


def _multihead(call: Call, layer: nn.MultiheadAttention, query: Value) -> Found:
    others = [call.tensor(1, "key"), call.tensor(2, "value")]
    states = [_sequence(call, query, layer.batch_first)]
    states += [None if v is None else _sequence(call, v, layer.batch_first) for v in others]
    state = _worst(states)
    if state is not None or None in others:
        return Parts(each=unknown_rank(call.name, state or State.UNKNOWN))
    query = of_rank(call.algebra, query, 3)
    place = query.place
    same = {of_rank(call.algebra, v, 3).place for v in others if v is not None} == {place}
    if not same or place is None:
        return Parts(each=unknown_rank(call.name, State.UNKNOWN))
    output = replace(query, name=call.name, sizes=(*query.sizes[:2], Size(layer.embed_dim)))
    need = call.argument(4, "need_weights", True)
    if need is False:
        return Parts((output, None))
    weights = unknown_rank(call.name, Place(0, place.outer, place.inner), (place.size,))
    return Parts((output, weights))


def _worst(states: list[State | None]) -> State | None:
    told = [state for state in states if state is not None]
    return State.UNKNOWN if State.UNKNOWN in told else next(iter(told), None)


def _transformer(call: Call, layer: Any, value: Value) -> Found:
    """Encoders and decoders: the output is laid out as the input."""
    inner = layer.layers[0] if hasattr(layer, "layers") else layer
    batch_first = inner.self_attn.batch_first
    values = [value]
    if isinstance(layer, _DECODERS):
        memory = call.tensor(1, "memory")
        if memory is None:
            return call.unknown()
        values.append(memory)
    state = _worst([_sequence(call, v, batch_first) for v in values])
    places = {of_rank(call.algebra, v, 3).place for v in values}
    if state is not None or len(places) > 1:
        return unknown_rank(call.name, state or State.UNKNOWN)
    return replace(of_rank(call.algebra, value, 3), name=call.name)
