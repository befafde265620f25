"""What functions and methods do to the axis of the batch: one small rule per operation.

A rule returns what is known of the call's output. An operation that is not here is one about which
nothing is known, and so is a call whose arguments a rule does not understand.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dropsurgery.graph.batch import along, numbers, parts, products, views
from dropsurgery.graph.batch.calls import Rule

# --- the tables ----------------------------------------------------------------------------------

_UNARY = """
    abs alpha_dropout bernoulli bfloat16 celu clone contiguous cos detach double dropout dropout1d
    dropout2d dropout3d elu erf exp expm1 feature_alpha_dropout float gelu group_norm half
    hardsigmoid hardswish hardtanh instance_norm leaky_relu log log1p logical_not logsigmoid
    long int int mish neg nan_to_num positive reciprocal relu relu_ relu6 requires_grad_ round rsqrt
    selu sigmoid sigmoid_ sign silu sin softplus softsign sqrt square tanh tanh_ to type type_as
    zeros_like ones_like full_like empty_like rand_like randn_like batch_norm bool cpu cuda isnan
    local_response_norm floor ceil threshold invert bitwise_not erfinv atan exp_ masked_fill_
"""
_BINARY = """
    add_ addcdiv addcmul and_ atan2 clamp clamp_ clamp_max clamp_min div_ divide eq fmod ge gt iadd
    imul isub itruediv le lerp logical_and logical_or lt masked_fill maximum minimum mul_ multiply
    ne or_ prelu remainder sub_ subtract true_divide where xor logaddexp clip
"""
_REDUCTIONS = "all amax amin any count_nonzero mean nanmean prod sum logsumexp argmax argmin"
_NUMBERS = "ceil floor sqrt log2 log pow max min round int abs float"

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), views.same),
    **dict.fromkeys(_BINARY.split(), lambda call: call.elementwise()),
    **dict.fromkeys(_REDUCTIONS.split(), along.reduction),
    **dict.fromkeys(("var", "std"), along.variance),
    **dict.fromkeys(("max", "min", "median"), along.pair_reduction),
    **dict.fromkeys(("sort", "cummax", "cummin"), along.pair_along),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum", "cumprod"), along.along_axes(1)),
    "argsort": along.along_axes(1, -1, resize=True),
    **dict.fromkeys(("view", "reshape"), views.reshape),
    **dict.fromkeys(("view_as", "reshape_as"), views.reshape_as),
    "expand_as": views.expand_as,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), views.transpose),
    **dict.fromkeys(("movedim", "moveaxis"), views.movedim),
    **dict.fromkeys(("cat", "concat", "concatenate"), parts.cat),
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes"), parts.split),
    **dict.fromkeys(("repeat", "tile"), views.repeat),
    **dict.fromkeys(("matmul", "bmm", "mm"), products.matmul),
    **{
        name: numbers.arithmetic("truediv" if name == "div" else name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "div")
    },
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty"), numbers.new("size", index=1)),
    "new_full": numbers.new_full,
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn"), numbers.new("size")),
    **dict.fromkeys(("rfft2", "irfft2", "fft2", "ifft2"), along.fft),
    **{f"conv{axes}d": products.conv(axes) for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": products.conv(axes) for axes in (1, 2, 3)},
    **{
        f"{kind}_pool{axes}d": along.pool(axes)
        for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp")
        for axes in (1, 2, 3)
    },
    "permute": views.permute, "t": views.t, "flatten": views.flatten, "unflatten": views.unflatten,
    "unsqueeze": views.unsqueeze, "squeeze": views.squeeze, "expand": views.expand,
    "repeat_interleave": views.repeat_interleave, "unbind": parts.unbind, "select": parts.select,
    "stack": parts.stack, "getitem": parts.getitem, "size": numbers.size, "numel": numbers.numel,
    "len": numbers.length, "norm": along.norm, "normalize": along.along_axes(2, 1),
    "glu": along.along_axes(1, -1, resize=True), "topk": along.topk, "roll": along.roll,
    "flip": along.flip, "pad": along.pad, "interpolate": along.resample, "narrow": along.narrow,
    "pixel_shuffle": lambda call: along.trailing(call, call.input, 3),
    "pixel_unshuffle": lambda call: along.trailing(call, call.input, 3), "linear": products.linear,
    "einsum": products.einsum, "scaled_dot_product_attention": products.attention,
    "embedding": products.embedding, "one_hot": products.one_hot, "gather": parts.gather,
    "index_select": along.index_select, "layer_norm": along.layer_norm,
    "rms_norm": along.layer_norm, "arange": numbers.arange, "meshgrid": numbers.meshgrid,
}  # fmt: skip


_SPACES = (torch, F, torch.fft, operator)
_FUNCTIONS: Mapping[Any, Rule] = {
    **{
        getattr(space, name): rule
        for name, rule in _RULES.items()
        for space in _SPACES
        if hasattr(space, name)
    },
    builtins.getattr: numbers.attribute,
    builtins.len: numbers.length,
    **{
        getattr(space, name): numbers.python
        for name in _NUMBERS.split()
        for space in (builtins, math)
        if hasattr(space, name)
    },
}
_METHODS: Mapping[str, Rule] = {
    name: rule for name, rule in _RULES.items() if hasattr(Tensor, name)
} | {"__len__": numbers.length}


def rule_of(target: Any) -> Rule | None:
    """Return the rule of a function, or of a method by its name."""
    if isinstance(target, str):
        return _METHODS.get(target)
    return _FUNCTIONS.get(target)
