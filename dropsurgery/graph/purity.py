"""Which nodes compute a value and do nothing else: the same each time, and without a trace."""

from __future__ import annotations

import builtins
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dropsurgery.graph.affine import argument
from dropsurgery.graph.draws import drawing_call, draws_with_a_flag
from dropsurgery.graph.leaves import has_hooks
from dropsurgery.graph.module import called_module
from dropsurgery.graph.ops import writes_in_place

# They act, leave their result to chance, or write what they return.
_OTHERS = frozenset(
    {"empty", "empty_like", "empty_strided", "manual_seed", "seed", "setitem", "delitem", "iadd",
     "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift",
     "isub", "itruediv", "ixor"}
)  # fmt: skip
_BUILTINS = (builtins.getattr, builtins.len, builtins.int, builtins.float, builtins.max,
             builtins.min, builtins.isinstance, builtins.bool, builtins.tuple)  # fmt: skip
# By identity: some of what these modules hold cannot be hashed or compared.
_KNOWN = frozenset(
    id(value)
    for space in (torch, F, torch._C._nn, operator, math)
    for name, value in vars(space).items()
    if callable(value) and not name.startswith(("_", "set_")) and name not in _OTHERS
) | {id(function) for function in _BUILTINS}
_METHODS = frozenset(
    [
        "abs",
        "add",
        "addmm",
        "amax",
        "amin",
        "argmax",
        "argmin",
        "bmm",
        "chunk",
        "clamp",
        "clone",
        "contiguous",
        "cos",
        "cumsum",
        "dim",
        "div",
        "double",
        "eq",
        "exp",
        "expand",
        "expand_as",
        "flatten",
        "flip",
        "float",
        "floor",
        "gather",
        "ge",
        "gelu",
        "gt",
        "half",
        "bfloat16",
        "index_select",
        "int",
        "le",
        "log",
        "long",
        "lt",
        "masked_fill",
        "matmul",
        "max",
        "maximum",
        "mean",
        "min",
        "minimum",
        "mm",
        "movedim",
        "mul",
        "narrow",
        "ne",
        "ndimension",
        "neg",
        "norm",
        "numel",
        "permute",
        "pow",
        "reciprocal",
        "relu",
        "repeat",
        "repeat_interleave",
        "reshape",
        "reshape_as",
        "roll",
        "rsqrt",
        "select",
        "sigmoid",
        "sin",
        "size",
        "softmax",
        "split",
        "sqrt",
        "squeeze",
        "stride",
        "sub",
        "sum",
        "swapaxes",
        "t",
        "tanh",
        "to",
        "transpose",
        "tril",
        "triu",
        "type_as",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
        "view_as",
        "where",
        "index_put",
        "masked_select",
        "new_zeros",
        "new_ones",
        "new_full",
        "square",
        "std",
        "var",
        "unfold",
        "softplus",
        "round",
        "log_softmax",
        "is_contiguous",
        "is_floating_point",
        "floor_divide",
        "true_divide",
        "remainder",
    ]
)


def is_pure(module: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether a node gives the same value for the same operands, and does nothing else.

    Raw random draws, writes in place, assertions, layers in training mode that draw or that keep
    statistics, and whatever is not known do something else.
    """
    if node.op == "get_attr":
        return True
    if node.op == "call_module":
        called = called_module(module, node)
        assert called is not None
        return _is_pure_module(called)
    if node.op == "call_method":
        return node.target in _METHODS and node.kwargs.get("out") is None
    if node.op != "call_function" or writes_in_place(module, node):
        return False
    return _is_pure_function(node)


def _is_pure_function(node: fx.Node) -> bool:
    function: Any = node.target
    if drawing_call(node) or node.kwargs.get("out") is not None:
        return False
    if function is F.scaled_dot_product_attention:
        rate = argument(node, 4, "dropout_p", 0.0)
        return isinstance(rate, int | float) and rate == 0.0
    if draws_with_a_flag(function):
        return argument(node, 2, "training", True) is False
    if function in (F.batch_norm, torch.batch_norm):
        is_torch = function is torch.batch_norm
        training = argument(node, 5, "training", False)
        mean = argument(node, 3 if is_torch else 1, "running_mean")
        return training is False or mean is None
    return id(function) in _KNOWN and getattr(function, "__name__", "") not in _OTHERS


def _is_pure_module(called: nn.Module) -> bool:
    for module in called.modules():
        home = type(module).__module__
        if has_hooks(module) or not home.startswith("torch.nn.modules."):
            return False
        keeps = any(True for _ in module.buffers(recurse=False))
        draws = "dropout" in home or isinstance(module, nn.RReLU | nn.MultiheadAttention)
        if module.training and (keeps or draws):
            return False
        if getattr(module, "inplace", False) or isinstance(module, nn.Transformer):
            return False
    return True


def is_surely_floating(module: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether a node's value is a tensor of floating-point numbers, whatever the inputs are."""
    seen: set[fx.Node] = set()
    while node not in seen:
        seen.add(node)
        dtype = getattr(node.meta.get("tensor_meta"), "dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype.is_floating_point
        if node.op == "get_attr":
            return False
        if node.op == "call_module":
            called = called_module(module, node)
            # Floating parameters take floating inputs and give floating outputs.
            own = next(iter(called.parameters()), None) if called is not None else None
            if isinstance(called, nn.Embedding) or own is not None:
                return isinstance(own, Tensor) and own.is_floating_point()
            if not type(called).__module__.startswith("torch.nn.modules."):
                return False
        elif node.op == "call_function":
            if node.target in _FLOATING:
                return True
            if node.target not in _KEEP_DTYPE:
                return False
        elif node.op == "call_method":
            if node.target not in _METHODS_KEEP_DTYPE:
                return False
        else:
            return False
        source = argument(node, 0, "input")
        if not isinstance(source, fx.Node):
            return False
        node = source
    return False


_FLOATING = frozenset(
    {F.conv1d, F.conv2d, F.conv3d, F.linear, F.layer_norm, F.batch_norm, F.group_norm, F.gelu,
     F.softmax, torch.softmax, torch.sigmoid, torch.tanh, F.scaled_dot_product_attention,
     operator.truediv, F.avg_pool2d, F.adaptive_avg_pool2d}
)  # fmt: skip
_KEEP_DTYPE = frozenset(
    {F.relu, torch.relu, torch.flatten, torch.reshape, torch.permute, torch.transpose, operator.add,
     operator.mul, operator.sub, torch.add, torch.mul, torch.sub, F.max_pool2d, F.pad}
)  # fmt: skip
_METHODS_KEEP_DTYPE = frozenset(
    {"view", "reshape", "permute", "transpose", "flatten", "contiguous", "clone", "relu", "add",
     "mul", "sub", "unsqueeze", "squeeze", "mean", "sum"}
)  # fmt: skip
