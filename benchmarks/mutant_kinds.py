"""Defects: each changes one thing in an ONNX file, or in the network before its export.

A kind takes the file and a generator of choices and returns the path of the module that it changed,
or None where the file holds nothing of the sort.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import nn

from dropsurgery.verify.marked import node_origin

Kind = Callable[[ModelProto, random.Random], str | None]
KINDS: dict[str, tuple[str, Kind]] = {}
# These change the network; its export is the mutant.
TORCH_KINDS: dict[str, Callable[[nn.Module, random.Random], str | None]] = {}

# The place of a defect that is in no module.
OUTPUTS = "(the outputs)"


def kind(group: str) -> Callable[[Kind], Kind]:
    """Enter a function among the kinds, under its name in words."""

    def enter(function: Kind) -> Kind:
        KINDS[function.__name__.strip("_").replace("_", " ")] = (group, function)
        return function

    return enter


def path_of(node: NodeProto) -> str:
    """Return the path of the module that holds a node."""
    return node_origin({item.key: item.value for item in node.metadata_props})[0] or ""


def array_of(model: ModelProto, name: str) -> np.ndarray | None:
    """Return a copy of an initializer, or None where a value is none."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            return numpy_helper.to_array(tensor).copy()
    return None


def give(model: ModelProto, node: NodeProto, index: int, array: np.ndarray) -> None:
    """Give a node a constant of its own: others may share the old one."""
    name = f"{node.input[index]}_mutant"
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    node.input[index] = name


def live(model: ModelProto) -> list[NodeProto]:
    """Return the nodes that depend on the inputs, but for those that compute shapes."""
    reached = {value.name for value in model.graph.input}
    found = []
    for node in model.graph.node:
        if not reached.isdisjoint(node.input) and node.op_type not in ("Shape", "Size"):
            reached.update(node.output)
            found.append(node)
    return found


def nodes_of(model: ModelProto, *types: str) -> list[NodeProto]:
    """Return the nodes of some types that depend on the inputs."""
    return [node for node in live(model) if node.op_type in types]


def _weights(model: ModelProto, least_rank: int = 2) -> list[tuple[NodeProto, int, np.ndarray]]:
    """Return (node, number of the input, values) of the weights of linear layers."""
    found = []
    for node in nodes_of(model, "Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM"):
        for index, name in enumerate(node.input[:2]):
            array = array_of(model, name)
            if array is not None and array.dtype == np.float32 and array.ndim >= least_rank:
                found.append((node, index, array))
    return found


def _biases(model: ModelProto) -> list[tuple[NodeProto, int, np.ndarray]]:
    found = []
    for node in nodes_of(model, "Conv", "ConvTranspose", "Gemm", "Add", "LayerNormalization"):
        for index, name in enumerate(node.input):
            array = array_of(model, name)
            first = 2 if node.op_type in ("Conv", "ConvTranspose", "LayerNormalization") else 0
            if array is not None and array.ndim == 1 and array.size > 1 and index >= first:
                found.append((node, index, array))
    return found


def _weight_kind(
    name: str, change: Callable[[np.ndarray], np.ndarray | None], rank: int = 2
) -> None:
    def apply(model: ModelProto, choose: random.Random) -> str | None:
        weights = _weights(model, rank)
        choose.shuffle(weights)
        for node, index, array in weights:
            changed = change(array)
            if changed is not None:
                give(model, node, index, changed.astype(np.float32))
                return path_of(node)
        return None

    KINDS[name] = ("weights", apply)


def _largest(array: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.abs(array).argmax(), array.shape))


def _element(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[_largest(array)] *= factor
        return array

    return change


def _swapped(axis: int) -> Callable[[np.ndarray], np.ndarray | None]:
    def change(array: np.ndarray) -> np.ndarray | None:
        if array.shape[axis] < 2:
            return None
        order = np.arange(array.shape[axis])
        order[[0, 1]] = order[[1, 0]]
        return array.take(order, axis)

    return change


def _transposed(array: np.ndarray) -> np.ndarray | None:
    square = array.ndim == 2 and array.shape[0] == array.shape[1]
    return array.T if square else None


def _int8(array: np.ndarray) -> np.ndarray:
    step = np.abs(array).max() / 127
    return np.round(array / step) * step


def _bfloat16(array: np.ndarray) -> np.ndarray:
    return torch.from_numpy(array).bfloat16().float().numpy()


def _spatial(
    change: Callable[[np.ndarray], np.ndarray],
) -> Callable[[np.ndarray], np.ndarray | None]:
    return lambda array: change(array) if array.ndim == 4 and array.shape[-1] > 1 else None


_weight_kind("sign of one weight", _element(-1.0))
_weight_kind("one weight 1 % off", _element(1.01))
_weight_kind("one weight zero", _element(0.0))
_weight_kind("output channels swapped", _swapped(0))
_weight_kind("input channels swapped", _swapped(1))
_weight_kind("square weight transposed", _transposed)
_weight_kind("kernel rotated by 180 degrees", _spatial(lambda a: a[..., ::-1, ::-1]))
_weight_kind("kernel transposed", _spatial(lambda a: a.swapaxes(-1, -2)))
_weight_kind("weights rounded to float16", lambda a: a.astype(np.float16))
_weight_kind("weights rounded to bfloat16", _bfloat16)
_weight_kind("weights rounded to int8", _int8)
_weight_kind("weights 0.1 % too large", lambda a: a * 1.001)


def _bias_kind(name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    def apply(model: ModelProto, choose: random.Random) -> str | None:
        biases = _biases(model)
        if not biases:
            return None
        node, index, array = choose.choice(biases)
        give(model, node, index, change(array).astype(np.float32))
        return path_of(node)

    KINDS[name] = ("weights", apply)


_bias_kind("sign of one bias", _element(-1.0))
_bias_kind("bias left out", np.zeros_like)
_bias_kind("biases off by 0.001", lambda a: a + 1e-3)


@kind("weights")
def _weights_of_two_layers_exchanged(model: ModelProto, choose: random.Random) -> str | None:
    weights = _weights(model)
    pairs = [
        (one, other)
        for i, one in enumerate(weights)
        for other in weights[i + 1 :]
        if one[2].shape == other[2].shape and one[0].op_type == other[0].op_type
    ]
    if not pairs:
        return None
    one, other = choose.choice(pairs)
    give(model, one[0], one[1], other[2])
    give(model, other[0], other[1], one[2])
    return path_of(one[0])


@kind("weights")
def _one_row_of_an_embedding(model: ModelProto, choose: random.Random) -> str | None:
    for node in nodes_of(model, "Gather"):
        table = array_of(model, node.input[0])
        if table is not None and table.ndim == 2 and table.dtype == np.float32:
            table[[3, 4]] = table[[4, 3]]
            give(model, node, 0, table)
            return path_of(node)
    return None


@kind("weights")
def _scale_of_one_channel_of_a_norm(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "LayerNormalization", "BatchNormalization"):
        scale = array_of(model, node.input[1])
        if scale is not None:
            scale[scale.size // 2] *= 1.01
            give(model, node, 1, scale)
            return path_of(node)
    return None


def _norm(change: Callable[[nn.modules.batchnorm._BatchNorm], None]) -> Callable[..., str | None]:
    def apply(model: nn.Module, choose: random.Random) -> str | None:
        norms = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        if not norms:
            return None
        name, module = choose.choice(norms)
        with torch.no_grad():
            change(module)
        return name

    return apply


def _stale_mean(norm: nn.modules.batchnorm._BatchNorm) -> None:
    assert norm.running_mean is not None
    norm.running_mean[0] += 0.01


def _stale_variance(norm: nn.modules.batchnorm._BatchNorm) -> None:
    assert norm.running_var is not None
    norm.running_var[0] *= 1.01


def _epsilon(norm: nn.modules.batchnorm._BatchNorm) -> None:
    norm.eps *= 100


TORCH_KINDS["stale mean of one channel"] = _norm(_stale_mean)
TORCH_KINDS["stale variance of one channel"] = _norm(_stale_variance)
TORCH_KINDS["epsilon of a BatchNorm"] = _norm(_epsilon)


# Attributes


def attribute_of(node: NodeProto, name: str) -> onnx.AttributeProto | None:
    """Return an attribute of a node, or None."""
    return next((a for a in node.attribute if a.name == name), None)


def set_attribute(node: NodeProto, name: str, value: object) -> None:
    """Give an attribute another value."""
    old = attribute_of(node, name)
    if old is not None:
        node.attribute.remove(old)
    node.attribute.append(helper.make_attribute(name, value))


def shuffled(model: ModelProto, choose: random.Random, *types: str) -> Iterator[NodeProto]:
    """Yield the nodes of some types in a random order."""
    nodes = nodes_of(model, *types)
    choose.shuffle(nodes)
    yield from nodes


@kind("attributes")
def _epsilon_of_a_norm(model: ModelProto, choose: random.Random) -> str | None:
    types = ("LayerNormalization", "BatchNormalization", "InstanceNormalization")
    for node in shuffled(model, choose, *types):
        old = attribute_of(node, "epsilon")
        set_attribute(node, "epsilon", 10 * (old.f if old is not None else 1e-5))
        return path_of(node)
    return None


@kind("attributes")
def _padding_on_one_side(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Conv"):
        pads = attribute_of(node, "pads")
        if pads is not None and len(pads.ints) == 4 and pads.ints[0] and pads.ints[1]:
            set_attribute(node, "pads", [0, 0, 2 * pads.ints[0], 2 * pads.ints[1]])
            return path_of(node)
    return None


@kind("attributes")
def _padding_left_out(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Conv"):
        pads = attribute_of(node, "pads")
        if pads is not None and any(pads.ints):
            set_attribute(node, "pads", [0] * len(pads.ints))
            return path_of(node)
    return None


@kind("attributes")
def _dilation(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Conv"):
        weight, pads = array_of(model, node.input[1]), attribute_of(node, "pads")
        if weight is not None and weight.shape[-1] > 1 and pads is not None and any(pads.ints):
            set_attribute(node, "dilations", [2, 2])
            grown = [
                p + (size - 1) // 2 for p, size in zip(pads.ints, 2 * weight.shape[2:], strict=True)
            ]
            set_attribute(node, "pads", grown)
            return path_of(node)
    return None


@kind("attributes")
def _ceil_mode(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "MaxPool", "AveragePool"):
        old = attribute_of(node, "ceil_mode")
        set_attribute(node, "ceil_mode", 1 - (old.i if old is not None else 0))
        return path_of(node)
    return None


@kind("attributes")
def _count_include_pad(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "AveragePool"):
        old = attribute_of(node, "count_include_pad")
        set_attribute(node, "count_include_pad", 1 - (old.i if old is not None else 0))
        return path_of(node)
    return None


@kind("attributes")
def _pooling_window_shifted(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "MaxPool", "AveragePool"):
        pads = attribute_of(node, "pads")
        if pads is not None and sum(pads.ints) == 4:
            set_attribute(node, "pads", [0, 0, 2, 2])
            return path_of(node)
    return None


@kind("attributes")
def _axis_of_a_softmax(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Softmax", "LogSoftmax"):
        old = attribute_of(node, "axis")
        axis = old.i if old is not None else -1
        set_attribute(node, "axis", -2 if axis == -1 else axis + 1)
        return path_of(node)
    return None


@kind("attributes")
def _axis_of_a_mean(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "ReduceMean"):
        axes = array_of(model, node.input[1])
        if axes is not None:
            changed = axes[:-1] if axes.size > 1 else np.array([2 if axes[0] == 1 else 1])
            give(model, node, 1, changed.astype(np.int64))
            return path_of(node)
    return None


@kind("attributes")
def _keepdims_of_a_mean(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "ReduceMean"):
        old = attribute_of(node, "keepdims")
        set_attribute(node, "keepdims", 1 - (old.i if old is not None else 1))
        return path_of(node)
    return None


@kind("attributes")
def _approximate_gelu(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Gelu"):
        set_attribute(node, "approximate", "tanh")
        return path_of(node)
    return None


@kind("attributes")
def _align_corners(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Resize"):
        set_attribute(node, "coordinate_transformation_mode", "align_corners")
        return path_of(node)
    return None


@kind("attributes")
def _interpolation_of_a_resize(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Resize"):
        mode = attribute_of(node, "mode")
        linear = mode is not None and mode.s == b"linear"
        set_attribute(node, "mode", "nearest" if linear else "linear")
        return path_of(node)
    return None


@kind("attributes")
def _alpha_of_a_layer(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "LeakyRelu", "Elu", "HardSigmoid", "Gemm"):
        old = attribute_of(node, "alpha")
        set_attribute(node, "alpha", 1.01 * (old.f if old is not None else 1.0))
        return path_of(node)
    return None


@kind("attributes")
def _groups_exchanged(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Conv"):
        group, weight = attribute_of(node, "group"), array_of(model, node.input[1])
        if weight is not None and group is not None and group.i > 1:
            each = weight.shape[0] // group.i
            order = np.roll(np.arange(weight.shape[0]), each)
            give(model, node, 1, weight[order])
            return path_of(node)
    return None


@kind("attributes")
def _number_of_groups(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Conv"):
        group, weight = attribute_of(node, "group"), array_of(model, node.input[1])
        single = group is None or group.i == 1
        if weight is not None and single and weight.shape[1] % 2 == 0 and weight.shape[0] % 2 == 0:
            set_attribute(node, "group", 2)
            give(model, node, 1, weight[:, : weight.shape[1] // 2])
            return path_of(node)
    return None


@kind("attributes")
def _order_of_axes(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Transpose"):
        old = attribute_of(node, "perm")
        perm = list(old.ints) if old is not None else []
        if len(perm) >= 3:
            perm[-1], perm[-2] = perm[-2], perm[-1]
            set_attribute(node, "perm", perm)
            return path_of(node)
    return None


@kind("attributes")
def _bound_of_a_clip(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Clip"):
        for index in range(1, len(node.input)):
            bound = array_of(model, node.input[index]) if node.input[index] else None
            if bound is not None and bound != 0:
                give(model, node, index, np.array(bound * 0.9, bound.dtype))
                return path_of(node)
    return None
