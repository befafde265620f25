"""How the shifts and scales of channels that `FoldAffine` leaves are written in ONNX."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from dropsurgery.errors import ArgumentError
from dropsurgery.layers.channel import ChannelScale, ChannelShift

ChannelMaps = Literal["conv", "elementwise"]


def check_channel_maps(value: object) -> None:
    """Refuse an unknown way."""
    if value not in get_args(ChannelMaps):
        known = " or ".join(map(repr, get_args(ChannelMaps)))
        raise ArgumentError(f"channel_maps is {value!r}", fix=known)


def write_as_convolutions(ir_model: Any, model: nn.Module) -> None:
    """Write x + t and x·s of float32 images as depthwise 1x1 convolutions: 1·x + t and s·x.

    Both are exact. onnxruntime computes chains of convolutions on a CPU in a blocked layout, which
    an addition of (C, 1, 1) leaves and a convolution keeps, with the activation behind it fused.

    Args:
        ir_model: the exported graph, which is changed.
        model: what it was exported from.
    """
    kinds = {
        f"{path}.{name}": kind
        for path, layer in model.named_modules()
        for kind, name, cls in (("Add", "shift", ChannelShift), ("Mul", "scale", ChannelScale))
        if type(layer) is cls
    }
    graph = ir_model.graph
    for node in [*graph]:
        stored = str(node.inputs[1].name) if len(node.inputs) == 2 and node.inputs[1] else ""
        if node.op_type == kinds.get(stored) and not node.outputs[0].is_graph_output():
            _replace(graph, node, stored.rpartition(".")[0])


def _replace(graph: Any, node: Any, path: str) -> None:
    """Put a convolution in the place of an addition or multiplication, where it is of images."""
    import numpy as np
    import onnx_ir

    data, constant = node.inputs
    values = None if constant.const_value is None else constant.const_value.numpy()
    if values is None or data.shape is None or len(data.shape) != 4:
        return
    if values.dtype != np.float32:  # the one dtype whose convolutions every CPU build has
        return
    if values.ndim not in (3, 4) or values.size != values.shape[-3]:
        return
    channels = values.size
    weight = np.ones(channels, values.dtype) if node.op_type == "Add" else values
    operands = {"weight": weight.reshape(channels, 1, 1, 1)}
    if node.op_type == "Add":
        operands["bias"] = values.reshape(channels)
    inputs = [data]
    for name, array in operands.items():
        value = onnx_ir.val(_free(graph, f"{path}.{name}"), const_value=onnx_ir.tensor(array))
        graph.register_initializer(value)
        inputs.append(value)
    written = onnx_ir.node(
        "Conv",
        inputs,
        {"group": channels, "kernel_shape": [1, 1]},
        metadata_props=dict(node.metadata_props),
    )
    old, new = node.outputs[0], written.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], [written], [old], [new])
    if not constant.uses():
        graph.initializers.pop(constant.name, None)


def _free(graph: Any, name: str) -> str:
    """Return a name that no initializer has."""
    count, found = 1, name
    while found in graph.initializers:
        found, count = f"{name}_{count}", count + 1
    return found
