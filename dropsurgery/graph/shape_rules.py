"""What shape a call's output has, given its input's: one small rule per operation.

A shape is a tuple with one entry per axis: its size, or None where the size is not known. A value
whose rank is not known, or that is no tensor, has the shape None. A rule that sees shapes on which
torch would raise an error raises `Contradiction`; a rule that is not sure answers None.

Convolutions and pooling take batched and unbatched inputs (a 2-d one rank 4 and rank 3). Where
the rank of their input is not known they are taken to be batched.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import batchnorm

from dropsurgery.graph.affine import (
    Refused,
    fetch,
    is_norm,
    norm_function,
    norm_ranks,
)
from dropsurgery.graph.drops import is_classic, is_drop_block, is_drop_path
from dropsurgery.graph.leaves import OWN_DROPS, forward_owner
from dropsurgery.graph.shape_calls import Call, Contradiction, Rule, Shape, broadcast, merge
from dropsurgery.graph.weighted import conv_axes, conv_function
from dropsurgery.layers.channel import ChannelScale, ChannelShift


def output_shape(call: Call) -> Shape | None:
    """Return the shape of a call's output, or None where it is not known.

    Raises:
        Contradiction: torch would raise an error on these inputs.
    """
    node = call.node
    if node.op == "get_attr":
        value = fetch(call.root, str(node.target))
        return tuple(value.shape) if isinstance(value, Tensor) else None
    if is_norm(node, call.called):
        return _norm(call)
    if node.op == "call_module":
        assert call.called is not None
        return _module(call, call.called)
    rule: Rule | None = None
    if node.op == "call_method":
        rule = _METHODS.get(str(node.target))
    elif node.op == "call_function":
        if conv_function(node.target) is not None:
            return _weighted_function(call)
        rule = _FUNCTIONS.get(node.target)
    # Arguments under numpy's names, and tuples in place of tensors, are left to no rule.
    unclear = not _NUMPY_NAMES.isdisjoint(node.kwargs) or node.kwargs.get("return_indices")
    return None if rule is None or unclear else rule(call)


_NUMPY_NAMES = frozenset({"axis", "keepdims", "out"})


def _module(call: Call, module: nn.Module) -> Shape | None:
    axes = conv_axes(module)
    if axes is not None:
        state: Any = module
        return windowed(call.input, axes, state.in_channels, state.out_channels)
    if isinstance(module, nn.Linear):
        return _linear(call.input, module.in_features, module.out_features)
    if isinstance(module, nn.Embedding):
        return None if call.input is None else (*call.input, module.embedding_dim)
    if isinstance(module, nn.Flatten):
        return _flattened(call.input, module.start_dim, module.end_dim)
    for cls, pool_axes in _POOLS.items():
        if isinstance(module, cls):
            pair = getattr(module, "return_indices", False)
            return None if pair else windowed(call.input, pool_axes)
    if isinstance(module, _SAME_SHAPE) or is_drop_path(module) or is_drop_block(module):
        return call.input
    if is_classic(module) or forward_owner(module) in OWN_DROPS:
        return call.input
    if isinstance(module, _SAME_RANK):
        shape = call.input
        return None if shape is None else (None,) * len(shape)
    return None


def windowed(
    shape: Shape | None, axes: int, channels_in: int | None = None, channels_out: int | None = None
) -> Shape | None:
    """Return the output shape of a convolution or pooling over the last `axes` axes."""
    spatial = (None,) * axes
    if shape is None:
        return (None, channels_out, *spatial)
    if len(shape) not in (axes + 1, axes + 2):
        raise Contradiction(f"rank {len(shape)} into an operation over {axes} axes")
    channels = merge(shape[-axes - 1], channels_in)
    return (*shape[: -axes - 1], channels if channels_out is None else channels_out, *spatial)


def _linear(shape: Shape | None, inputs: int | None, outputs: int | None) -> Shape | None:
    if shape is None:
        return None
    if not shape:
        raise Contradiction("a scalar into a linear layer")
    merge(shape[-1], inputs)
    return (*shape[:-1], outputs)


def _weighted_function(call: Call) -> Shape | None:
    known = conv_function(call.node.target)
    assert known is not None
    axes, transposed = known
    weight = call.shape(call.argument(1, "weight"))
    if axes is None:
        if weight is not None and len(weight) == 2:
            return _linear(call.input, weight[1], weight[0])
        return None
    groups = call.argument(6, "groups", 1)
    if weight is None or len(weight) != axes + 2 or not isinstance(groups, int):
        return windowed(call.input, axes)
    along, across = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
    if transposed:
        return windowed(call.input, axes, across, None if along is None else along * groups)
    return windowed(call.input, axes, None if across is None else across * groups, along)


def _norm(call: Call) -> Shape | None:
    """A BatchNorm's channel axis is 1: its input has C entries there."""
    shape, module = call.input, call.called
    ranks: tuple[int, ...] | None = None
    channels: int | None = None
    if norm_function(call.node, module) is None:
        assert module is not None
        try:
            ranks = norm_ranks(module)
        except Refused:
            return None
        if not isinstance(module, batchnorm._BatchNorm):
            # A frozen one broadcasts, and so takes what torch's refuses.
            return shape if shape is not None and len(shape) == 4 else None
        channels = module.num_features
    if shape is None:
        known = ranks is not None and len(ranks) == 1
        return (None, channels, *(None,) * (ranks[0] - 2)) if known and ranks else None
    if len(shape) < 2 or (ranks is not None and len(shape) not in ranks):
        raise Contradiction(f"rank {len(shape)} into {call.node.name}")
    return (shape[0], merge(shape[1], channels), *shape[2:])


def _flattened(shape: Shape | None, start: Any, end: Any) -> Shape | None:
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    if shape is None:
        # Everything from axis `start` on becomes one axis, however many there are.
        return (None,) * (start + 1) if end == -1 and start >= 0 else None
    rank = max(len(shape), 1)
    if not (-rank <= start < rank and -rank <= end < rank):
        raise Contradiction(f"flatten({start}, {end}) of rank {len(shape)}")
    start, end = start % rank, end % rank
    sizes = [size for size in shape[start : end + 1] if size is not None]
    known = len(sizes) == end + 1 - start
    return (*shape[:start], math.prod(sizes) if known else None, *shape[end + 1 :])


def _flatten(call: Call) -> Shape | None:
    return _flattened(call.input, call.argument(1, "start_dim", 0), call.argument(2, "end_dim", -1))


def _same(call: Call) -> Shape | None:
    return call.input


def _same_if_alone(call: Call) -> Shape | None:
    """The bounds of `clamp` may be tensors, and then broadcast."""
    return call.input if len(call.node.all_input_nodes) == 1 else None


def _same_rank(call: Call) -> Shape | None:
    shape = call.input
    return None if shape is None else (None,) * len(shape)


def _as_other(call: Call) -> Shape | None:
    return call.shape(call.argument(1, "other"))


def _elementwise(call: Call) -> Shape | None:
    return broadcast(call.input, call.shape(call.argument(1, "other")))


def _axes(rank: int, dim: Any) -> tuple[int, ...] | None:
    """Return axes counted from the front; None where they are not literal."""
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    if not all(isinstance(axis, int) for axis in dims):
        return None
    if not all(-rank <= axis < rank for axis in dims):
        raise Contradiction(f"axes {tuple(dims)} of rank {rank}")
    return tuple(axis % rank for axis in dims)


def _reduction(call: Call) -> Shape | None:
    shape, dim = call.input, call.argument(1, "dim")
    keep = call.argument(2, "keepdim", False)
    if dim is None:
        return ()
    if shape is None or not shape or not isinstance(keep, bool):
        return None
    axes = _axes(len(shape), dim)
    if not axes:  # no axes at all means every axis to some reductions
        return None
    kept = ((1 if axis in axes else size) for axis, size in enumerate(shape))
    return tuple(kept if keep else (s for a, s in enumerate(shape) if a not in axes))


def _cat(call: Call) -> Shape | None:
    tensors, dim = call.argument(0, "tensors"), call.argument(1, "dim", 0)
    if not isinstance(tensors, tuple | list) or not isinstance(dim, int):
        return None
    shapes = [call.shape(tensor) for tensor in tensors]
    known = [shape for shape in shapes if shape is not None]
    # An empty tensor of rank 1 may be joined to any other, so ranks that differ prove nothing.
    if not known or len({len(shape) for shape in known}) > 1 or len(known[0]) < 2:
        return None
    axes = _axes(len(known[0]), dim)
    assert axes is not None
    merged: Shape = tuple(_common(sizes) for sizes in zip(*known, strict=True))
    total = [shape[axes[0]] for shape in known]
    size = sum(s for s in total if s is not None)
    known_size = len(known) == len(shapes) and None not in total
    return tuple(
        (size if known_size else None) if axis == axes[0] else common
        for axis, common in enumerate(merged)
    )


def _common(sizes: Sequence[int | None]) -> int | None:
    return sizes[0] if len(set(sizes)) == 1 else None


def _permute(call: Call) -> Shape | None:
    order = _literal_list(call, 1, "dims")
    shape = call.input
    if order is None or not all(isinstance(axis, int) for axis in order):
        return None
    if shape is None:
        return (None,) * len(order)
    axes = _axes(len(shape), tuple(order))
    if axes is None or len(order) != len(shape):
        raise Contradiction(f"a permutation of {len(order)} axes of rank {len(shape)}")
    return tuple(shape[axis] for axis in axes)


def _transpose(call: Call) -> Shape | None:
    shape = call.input
    axes = None
    if shape is not None:
        axes = _axes(len(shape), (call.argument(1, "dim0"), call.argument(2, "dim1")))
    if shape is None or axes is None:
        return None
    swapped = list(shape)
    swapped[axes[0]], swapped[axes[1]] = swapped[axes[1]], swapped[axes[0]]
    return tuple(swapped)


def _literal_list(call: Call, index: int, name: str) -> list[Any] | None:
    """Return a list of sizes or axes, given as one tuple or as several arguments."""
    rest = call.node.args[index:] or (call.node.kwargs.get(name),)
    if len(rest) == 1 and isinstance(rest[0], tuple | list):
        return list(rest[0])
    # One node may stand for a whole torch.Size.
    single = len(rest) == 1 and not isinstance(rest[0], int)
    return None if single else list(rest)


def _reshape(call: Call) -> Shape | None:
    sizes = _literal_list(call, 1, "shape")
    if sizes is None or not all(isinstance(size, int | fx.Node) for size in sizes):
        return None
    return tuple(size if isinstance(size, int) and size >= 0 else None for size in sizes)


def _unsqueeze(call: Call) -> Shape | None:
    shape, dim = call.input, call.argument(1, "dim")
    if shape is None or not isinstance(dim, int):
        return None
    axes = _axes(len(shape) + 1, dim)
    assert axes is not None
    return (*shape[: axes[0]], 1, *shape[axes[0] :])


def _squeeze(call: Call) -> Shape | None:
    shape, dim = call.input, call.argument(1, "dim")
    if shape is None or not shape or not isinstance(dim, int):
        return None
    axes = _axes(len(shape), dim)
    assert axes is not None
    size = shape[axes[0]]
    if size is None:
        return None  # it goes only where it is 1
    return shape if size != 1 else (*shape[: axes[0]], *shape[axes[0] + 1 :])


def _getitem(call: Call) -> Shape | None:
    shape, index = call.input, call.argument(1, "key")
    parts = list(index) if isinstance(index, tuple) else [index]
    if shape is None or not all(_is_plain_index(part) for part in parts):
        return None
    used = sum(part is not None and part is not Ellipsis for part in parts)
    if used > len(shape):
        raise Contradiction(f"{used} indices into rank {len(shape)}")
    if Ellipsis not in parts:
        parts.append(Ellipsis)
    rest, out = list(shape), list[int | None]()
    for part in parts:
        if part is None:
            out.append(1)
        elif part is Ellipsis:
            count = len(shape) - used
            out += rest[:count]
            del rest[:count]
        else:
            size = rest.pop(0)
            if isinstance(part, slice):
                out.append(size if part == slice(None) else None)
    return tuple(out)


def _is_plain_index(part: Any) -> bool:
    plain = part is None or part is Ellipsis or isinstance(part, int | slice)
    return plain and not isinstance(part, bool)


def _pool(axes: int) -> Rule:
    return lambda call: windowed(call.input, axes)


def _matmul(call: Call) -> Shape | None:
    left, right = call.input, call.shape(call.argument(1, "other", call.node.kwargs.get("mat2")))
    if left is None or right is None or len(right) < 2 or not left:
        return None
    if len(right) == 2:
        return _linear(left, *right)
    if len(left) < 2:
        return None
    batch = broadcast(left[:-2], right[:-2])
    merge(left[-1], right[-2])
    return None if batch is None else (*batch, left[-2], right[-1])


def _embedding(call: Call) -> Shape | None:
    table = call.shape(call.argument(1, "weight"))
    return None if call.input is None or table is None else (*call.input, table[-1])


def _fixed(rank: int) -> Rule:
    return lambda call: (None,) * rank


_ACTIVATIONS = tuple(
    value
    for value in vars(nn.modules.activation).values()
    if isinstance(value, type)
    and issubclass(value, nn.Module)
    and value not in (nn.Module, nn.MultiheadAttention, nn.GLU)
)
_SAME_SHAPE: tuple[type[nn.Module], ...] = (
    *_ACTIVATIONS,
    ChannelScale,
    ChannelShift,
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)
_SAME_RANK: tuple[type[nn.Module], ...] = (
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.GLU,
    *(
        getattr(nn, f"{kind}Pad{axes}d")
        for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")
        for axes in (1, 2, 3)
    ),
)
_POOL_KINDS = ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")
_POOLS: Mapping[type[nn.Module], int] = {
    getattr(nn, f"{kind}{axes}d"): axes for kind in _POOL_KINDS for axes in (1, 2, 3)
} | {nn.LPPool1d: 1, nn.LPPool2d: 2}

_UNARY = """
    abs alpha_dropout bfloat16 celu clone contiguous cos detach double dropout dropout1d dropout2d
    dropout3d elu erf exp feature_alpha_dropout float gelu group_norm half hardsigmoid hardswish
    hardtanh instance_norm layer_norm leaky_relu log log_softmax logsigmoid mish neg normalize prelu
    reciprocal relu relu_ relu6 requires_grad_ rms_norm round rsqrt selu sigmoid sigmoid_ sign silu
    sin softmax softplus sqrt square tanh to
"""
_BINARY = """
    add add_ div div_ divide eq floordiv ge gt iadd imul isub itruediv le lt maximum minimum mul
    mul_ multiply ne pow sub sub_ subtract true_divide truediv
"""
_REDUCTIONS = "amax amin mean prod sum"  # var and std take something else before keepdim
_SAME_RANK_FUNCTIONS = "flip interpolate pad pixel_shuffle pixel_unshuffle roll"
_NAMED: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), _same),
    **dict.fromkeys(_BINARY.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(_SAME_RANK_FUNCTIONS.split(), _same_rank),
    **dict.fromkeys(("clamp", "clamp_", "clamp_min", "clamp_max"), _same_if_alone),
    **dict.fromkeys(("view", "reshape", "expand"), _reshape),
    **dict.fromkeys(("view_as", "reshape_as", "expand_as"), _as_other),
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(("transpose", "swapaxes"), _transpose),
    **{
        f"{kind}_pool{axes}d": _pool(axes)
        for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
        for axes in (1, 2, 3)
    },
    "flatten": _flatten,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "getitem": _getitem,
    "addmm": _fixed(2),
    "bmm": _fixed(3),
    "embedding": _embedding,
    **dict.fromkeys(("matmul", "mm"), _matmul),
}
_SPACES: tuple[ModuleType, ...] = (torch, F, operator)
_FUNCTIONS: Mapping[Any, Rule] = {
    getattr(space, name): rule
    for name, rule in _NAMED.items()
    for space in _SPACES
    if hasattr(space, name)
}
_METHODS: Mapping[str, Rule] = {
    name: rule for name, rule in _NAMED.items() if hasattr(Tensor, name)
}
