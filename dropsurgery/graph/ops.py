"""What each operation is: one table for modules, functions and methods.

Only what an analysis may rely on is written down; an operation that is not here is `NONLINEAR`,
the kind about which nothing may be assumed.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from dropsurgery.graph.drops import is_classic, is_drop
from dropsurgery.graph.leaves import FROZEN_BATCHNORMS, is_one_of
from dropsurgery.graph.module import called_module
from dropsurgery.layers.channel import ChannelScale, ChannelShift
from dropsurgery.layers.drop_connect import linear


class Kind(Enum):
    """What an operation does to the values of its (first) tensor operand in eval mode."""

    ALIAS = auto()  # the same values, perhaps in another layout
    DROP = auto()  # stochastic in training, the identity in eval
    SLICE = auto()  # some of the values
    LINEAR = auto()  # an affine map with constant coefficients
    POOL = auto()  # a maximum over windows
    NORM = auto()  # statistics of the input itself: LayerNorm, GroupNorm
    NONLINEAR = auto()  # anything else
    ADD = auto()  # the sum of two operands
    SUB = auto()  # the difference of two operands
    PRODUCT = auto()  # linear in each operand: mul, div, matmul
    CONCAT = auto()  # operands side by side
    SPLIT = auto()  # a tuple of parts
    ITEM = auto()  # x[...]: a slice of a tensor, or an entry of a tuple
    SHAPE = auto()  # sizes and other Python values; not data
    CREATE = auto()  # a new tensor that does not depend on operands' values


_MODULES: tuple[tuple[tuple[type, ...], Kind], ...] = (
    (
        (nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle,
         nn.ChannelShuffle),
        Kind.ALIAS,
    ),
    ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), Kind.NORM),
    (
        (nn.modules.conv._ConvNd, nn.Linear, _NormBase, nn.AvgPool1d, nn.AvgPool2d,
         nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
         ChannelScale, ChannelShift, nn.Upsample,
         nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd,
         nn.modules.padding._ReplicationPadNd, nn.modules.padding._CircularPadNd),
        Kind.LINEAR,
    ),
    (
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
         nn.AdaptiveMaxPool3d),
        Kind.POOL,
    ),
    ((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm), Kind.NORM),
)  # fmt: skip

_FUNCTIONS: dict[Callable[..., Any], Kind] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), Kind.ADD),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), Kind.SUB),
    **dict.fromkeys(
        (operator.mul, operator.imul, torch.mul, operator.truediv, operator.itruediv, torch.div,
         operator.matmul, torch.matmul, torch.bmm, torch.einsum),
        Kind.PRODUCT,
    ),
    **dict.fromkeys((torch.cat, torch.concat, torch.stack), Kind.CONCAT),
    **dict.fromkeys((torch.split, torch.chunk, torch.unbind, torch.tensor_split), Kind.SPLIT),
    operator.getitem: Kind.ITEM,
    **dict.fromkeys(
        (torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze,
         torch.unsqueeze, torch.roll, torch.flip, torch.movedim, torch.swapaxes,
         F.pixel_shuffle, F.pixel_unshuffle, torch.channel_shuffle),
        Kind.ALIAS,
    ),
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout),
        Kind.DROP,
    ),
    **dict.fromkeys((torch.narrow, torch.select, torch.index_select), Kind.SLICE),
    **dict.fromkeys(
        (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
         F.conv_transpose3d, F.linear, linear, F.batch_norm, F.avg_pool1d, F.avg_pool2d,
         F.avg_pool3d,
         F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.interpolate,
         F.pad, torch.mean, torch.sum, torch.neg, operator.neg),
        Kind.LINEAR,
    ),
    **dict.fromkeys(
        (F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d,
         torch.max, torch.amax, torch.min, torch.amin), Kind.POOL),
    **dict.fromkeys((F.layer_norm, F.group_norm, F.rms_norm, F.instance_norm), Kind.NORM),
    **dict.fromkeys(
        (torch._assert, operator.eq, operator.ne, operator.lt, operator.le, operator.gt,
         operator.ge, operator.not_, operator.floordiv, operator.mod, operator.is_,
         torch.is_tensor, torch.is_floating_point, builtins.len, builtins.int, builtins.float,
         builtins.isinstance, math.floor, math.ceil, math.sqrt),
        Kind.SHAPE,
    ),
    **dict.fromkeys(
        (torch.arange, torch.zeros, torch.ones, torch.empty, torch.full, torch.linspace,
         torch.eye, torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like,
         torch.tensor),
        Kind.CREATE,
    ),
}  # fmt: skip

# Functions of other libraries that stay calls, by qualified name.
_NAMED_FUNCTIONS: dict[str, Kind] = {
    "torchvision.models.video.mvit._squeeze": Kind.ALIAS,
    "torchvision.models.video.mvit._unsqueeze": Kind.ALIAS,
}

_METHODS: dict[str, Kind] = {
    **dict.fromkeys(("add", "add_"), Kind.ADD),
    **dict.fromkeys(("sub", "sub_"), Kind.SUB),
    **dict.fromkeys(("mul", "mul_", "div", "div_", "matmul", "bmm"), Kind.PRODUCT),
    **dict.fromkeys(("split", "chunk", "unbind", "tensor_split"), Kind.SPLIT),
    **dict.fromkeys(
        ("view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous", "clone",
         "squeeze", "unsqueeze", "roll", "flip", "expand", "expand_as", "movedim", "swapaxes",
         "to", "type_as", "float", "half", "bfloat16", "double", "detach", "view_as",
         "reshape_as"),
        Kind.ALIAS,
    ),
    **dict.fromkeys(("narrow", "select", "index_select"), Kind.SLICE),
    **dict.fromkeys(("mean", "sum", "neg"), Kind.LINEAR),
    **dict.fromkeys(("max", "amax", "min", "amin"), Kind.POOL),
    **dict.fromkeys(("size", "dim", "numel", "stride", "is_contiguous", "__len__", "item",
                     "get_device", "is_floating_point"), Kind.SHAPE),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"), Kind.CREATE),
}  # fmt: skip

# "values" is what max(dim) returns beside the indices.
_TENSOR_ATTRIBUTES = frozenset({"T", "mT", "data", "real", "values"})


def module_kind(module: nn.Module) -> Kind:
    """Return the kind of a leaf module."""
    if is_drop(module):
        return Kind.DROP
    if is_classic(module) or is_one_of(module, FROZEN_BATCHNORMS):
        return Kind.LINEAR
    if isinstance(module, _NormBase) and not all(
        module_kind(child) in (Kind.ALIAS, Kind.DROP) for child in module.children()
    ):
        return Kind.NONLINEAR  # timm's BatchNormAct2d with an activation in it
    for classes, kind in _MODULES:
        if isinstance(module, classes):
            return kind
    return Kind.NONLINEAR


def kind_of(module: fx.GraphModule, node: fx.Node) -> Kind:
    """Return the kind of a node of `module`."""
    if node.op == "call_module":
        called = called_module(module, node)
        assert called is not None
        return module_kind(called)
    if node.op == "call_method":
        return _METHODS.get(str(node.target), Kind.NONLINEAR)
    if node.op == "call_function":
        if node.target is builtins.getattr:
            return Kind.ALIAS if node.args[1] in _TENSOR_ATTRIBUTES else Kind.SHAPE
        name = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"
        return _FUNCTIONS.get(node.target, _NAMED_FUNCTIONS.get(name, Kind.NONLINEAR))  # type: ignore[arg-type]
    return Kind.CREATE if node.op == "get_attr" else Kind.NONLINEAR


def writes_in_place(module: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether a node writes its result into its first operand."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_module":
        return bool(getattr(called_module(module, node), "inplace", False))
    name = getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or name in _IN_PLACE_OPERATORS
    return node.op == "call_function" and (in_place or node.kwargs.get("inplace") is True)


def is_fused_add(node: fx.Node) -> bool:
    """Say whether a node adds operands that it also multiplies: addcmul, lerp and their kin."""
    name = getattr(node.target, "__name__", str(node.target)).rstrip("_")
    return node.op in ("call_function", "call_method") and name in _FUSED_ADDS


_FUSED_ADDS = frozenset({"addcmul", "addcdiv", "lerp", "addmm", "addbmm", "baddbmm", "addmv"})
_IN_PLACE_OPERATORS = frozenset({"iadd", "isub", "imul", "itruediv"})


class Role(Enum):
    """What a value is, whatever its operation."""

    DATA = auto()  # a tensor that depends on the network's input
    CONSTANT = auto()  # a tensor that does not: parameters, buffers, position tables
    SCALAR = auto()  # sizes, flags and other Python values


_ARITHMETIC = frozenset({Kind.ADD, Kind.SUB, Kind.PRODUCT, Kind.ITEM, Kind.SHAPE})


def roles(
    module: fx.GraphModule, graph: fx.Graph, kinds: Mapping[fx.Node, Kind] | None = None
) -> dict[fx.Node, Role]:
    """Return the role of every node, by one walk in topological order.

    Args:
        module: the traced module.
        graph: one of its graphs.
        kinds: the kind of every node, if the caller has them.
    """
    found: dict[fx.Node, Role] = {}
    for node in graph.nodes:
        inputs = {found[value] for value in node.all_input_nodes}
        found[node] = _role(node, kind_of(module, node) if kinds is None else kinds[node], inputs)
    return found


def _role(node: fx.Node, kind: Kind, inputs: set[Role]) -> Role:
    if node.op == "placeholder":
        return Role.DATA
    if kind is Kind.SHAPE and not (Role.DATA in inputs and node.target in _COMPARISONS):
        return Role.SCALAR
    if kind is Kind.CREATE:
        return Role.CONSTANT
    if Role.DATA in inputs:
        return Role.DATA
    if Role.CONSTANT in inputs:
        return Role.CONSTANT
    if kind in _ARITHMETIC or getattr(node.target, "__module__", "") in ("math", "builtins"):
        return Role.SCALAR
    return Role.CONSTANT


_COMPARISONS = frozenset(
    {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
     operator.floordiv, operator.mod}
)  # fmt: skip
