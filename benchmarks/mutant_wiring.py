"""Defects in the wiring of an ONNX graph, its dtypes and shapes, its outputs, and rare inputs."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from benchmarks.mutant_kinds import OUTPUTS, array_of, give, kind, live, nodes_of, path_of, shuffled

ACTIVATIONS = (
    *("Relu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Tanh"),
    *("Softmax", "LogSoftmax"),
)


def _index(model: ModelProto, node: NodeProto) -> int:
    return next(i for i, other in enumerate(model.graph.node) if other is node or other == node)


def _dead_end(node: NodeProto, keep: int) -> None:
    """Turn a node into one that passes one of its inputs on."""
    kept = node.input[keep]
    node.op_type, node.input[:] = "Identity", [kept]
    del node.attribute[:]


def _before(model: ModelProto, node: NodeProto, index: int, *ops: NodeProto) -> None:
    """Put nodes between one input of a node and the node; they bear its module's name."""
    place, name = _index(model, node), node.input[index]
    for number, op in enumerate(ops):
        op.input.insert(0, name)
        name = f"{node.output[0]}_mutant_{number}"
        op.output[:] = [name]
        op.name = f"{node.name}_mutant_{number}"
        op.metadata_props.extend(node.metadata_props)
        model.graph.node.insert(place + number, op)
    model.graph.node[place + len(ops)].input[index] = name


def _types(model: ModelProto) -> dict[str, tuple[object, ...]]:
    """Return the shapes of the values that the exporter noted."""
    known = {}
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value or d.dim_param for d in tensor.shape.dim)
        if tensor.elem_type == TensorProto.FLOAT and shape:
            known[value.name] = shape
    return known


def _sums(model: ModelProto) -> Iterator[NodeProto]:
    """Yield the adds of two values that both depend on the input, and are of one shape."""
    made, shapes = {o for n in live(model) for o in n.output}, _types(model)
    for node in nodes_of(model, "Add"):
        one, other = (shapes.get(name) for name in node.input)
        if one is not None and one == other and all(name in made for name in node.input):
            yield node


@kind("wiring")
def _operands_exchanged(model: ModelProto, choose: random.Random) -> str | None:
    """Of what does not commute: a subtraction, a concatenation, a product of square matrices."""
    shapes = _types(model)
    for node in shuffled(model, choose, "Concat", "Sub", "Div", "Pow", "MatMul"):
        names = list(node.input)
        alike = len(names) == 2 and shapes.get(names[0]) == shapes.get(names[1]) is not None
        if (
            node.op_type == "Concat"
            and len(names) > 1
            and names[0] in shapes
            and names[1] in shapes
        ):
            alike = True
        if alike and names[0] != names[1]:
            node.input[0], node.input[1] = names[1], names[0]
            return path_of(node)
    return None


@kind("wiring")
def _residual_skipped(model: ModelProto, choose: random.Random) -> str | None:
    sums = list(_sums(model))
    if not sums:
        return None
    node = choose.choice(sums)
    _dead_end(node, 0)
    return path_of(node)


@kind("wiring")
def _branch_skipped(model: ModelProto, choose: random.Random) -> str | None:
    sums = list(_sums(model))
    if not sums:
        return None
    node = choose.choice(sums)
    _dead_end(node, 1)
    return path_of(node)


@kind("wiring")
def _branch_added_twice(model: ModelProto, choose: random.Random) -> str | None:
    sums = list(_sums(model))
    if not sums:
        return None
    node = choose.choice(sums)
    node.input[1] = node.input[0]
    return path_of(node)


@kind("wiring")
def _value_of_another_layer(model: ModelProto, choose: random.Random) -> str | None:
    """A node reads an earlier value of the same shape."""
    shapes, seen = _types(model), []
    options = []
    for node in live(model):
        for index, name in enumerate(node.input):
            others = [other for other in seen if shapes.get(other) == shapes.get(name, "none")]
            others = [other for other in others if other not in node.input]
            if others and node.op_type not in ("Reshape", "Transpose", "Shape"):
                options.append((node, index, others))
        seen.extend(node.output)
    if not options:
        return None
    node, index, others = choose.choice(options)
    node.input[index] = choose.choice(others)
    return path_of(node)


@kind("wiring")
def _activation_skipped(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, *ACTIVATIONS):
        _dead_end(node, 0)
        return path_of(node)
    return None


@kind("wiring")
def _norm_skipped(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "LayerNormalization", "BatchNormalization"):
        _dead_end(node, 0)
        return path_of(node)
    return None


@kind("wiring")
def _gate_skipped(model: ModelProto, choose: random.Random) -> str | None:
    """A product of two values, as of squeeze-and-excitation, passes the larger one on."""
    made = {o for n in live(model) for o in n.output}
    for node in shuffled(model, choose, "Mul"):
        if all(name in made for name in node.input):
            _dead_end(node, 0)
            return path_of(node)
    return None


@kind("wiring")
def _another_activation(model: ModelProto, choose: random.Random) -> str | None:
    other = {"Relu": "Elu", "Gelu": "Relu", "Sigmoid": "HardSigmoid", "HardSigmoid": "Sigmoid"}
    other |= {"HardSwish": "Relu", "LeakyRelu": "Relu", "Elu": "Relu", "Tanh": "Softsign"}
    for node in shuffled(model, choose, *other):
        node.op_type = other[node.op_type]
        del node.attribute[:]
        return path_of(node)
    return None


@kind("wiring")
def _leak_of_1e_4(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Relu"):
        node.op_type = "LeakyRelu"
        node.attribute.append(helper.make_attribute("alpha", 1e-4))
        return path_of(node)
    return None


@kind("equivalent")
def _operands_of_a_sum_exchanged(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Add"):
        node.input[0], node.input[1] = node.input[1], node.input[0]
        return path_of(node)
    return None


@kind("equivalent")
def _activation_applied_twice(model: ModelProto, choose: random.Random) -> str | None:
    """Of a ReLU, which changes nothing."""
    for node in shuffled(model, choose, "Relu"):
        _before(model, node, 0, helper.make_node("Relu", [], []))
        return path_of(node)
    return None


@kind("equivalent")
def _copy_of_a_value(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Conv", "Gemm", "MatMul"):
        _before(model, node, 0, helper.make_node("Identity", [], []))
        return path_of(node)
    return None


def _through(model: ModelProto, choose: random.Random, dtype: int) -> str | None:
    for node in shuffled(model, choose, "Conv", "Gemm", "MatMul", *ACTIVATIONS):
        there = helper.make_node("Cast", [], [], to=dtype)
        _before(model, node, 0, there, helper.make_node("Cast", [], [], to=TensorProto.FLOAT))
        return path_of(node)
    return None


@kind("dtype and shape")
def _value_rounded_to_float16(model: ModelProto, choose: random.Random) -> str | None:
    return _through(model, choose, TensorProto.FLOAT16)


@kind("dtype and shape")
def _value_rounded_to_bfloat16(model: ModelProto, choose: random.Random) -> str | None:
    return _through(model, choose, TensorProto.BFLOAT16)


def _after_output(model: ModelProto, index: int, *ops: NodeProto) -> str:
    """Put nodes behind an output, which keeps its name."""
    name = model.graph.output[index].name
    maker = next(node for node in model.graph.node if name in node.output)
    inner = f"{name}_mutant"
    for node in model.graph.node:
        node.input[:] = [inner if value == name else value for value in node.input]
        node.output[:] = [inner if value == name else value for value in node.output]
    value = inner
    for number, op in enumerate(ops):
        op.input.insert(0, value)
        value = name if number == len(ops) - 1 else f"{inner}_{number}"
        op.output[:] = [value]
        op.name = f"{maker.name}_mutant_{number}"
        op.metadata_props.extend(maker.metadata_props)
        model.graph.node.append(op)
    return path_of(maker)


@kind("dtype and shape")
def _output_in_float64(model: ModelProto, choose: random.Random) -> str | None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    return _after_output(model, 0, helper.make_node("Cast", [], [], to=TensorProto.DOUBLE))


@kind("dtype and shape")
def _output_with_one_axis_more(model: ModelProto, choose: random.Random) -> str | None:
    model.graph.output[0].type.tensor_type.ClearField("shape")
    axes = onnx.numpy_helper.from_array(np.array([1]), "mutant_axes")
    model.graph.initializer.append(axes)
    return _after_output(model, 0, helper.make_node("Unsqueeze", ["mutant_axes"], []))


@kind("dtype and shape")
def _output_transposed(model: ModelProto, choose: random.Random) -> str | None:
    """Of a batch of one, where the shape may stay the same by broadcasting."""
    rank = len(model.graph.output[0].type.tensor_type.shape.dim)
    if rank < 2:
        return None
    model.graph.output[0].type.tensor_type.ClearField("shape")
    perm = [1, 0, *range(2, rank)]
    return _after_output(model, 0, helper.make_node("Transpose", [], [], perm=perm))


@kind("dtype and shape")
def _last_axis_reversed(model: ModelProto, choose: random.Random) -> str | None:
    for name, values in (("starts", [-1]), ("ends", [-(2**62)]), ("axes", [-1]), ("steps", [-1])):
        array = onnx.numpy_helper.from_array(np.array(values), f"mutant_{name}")
        model.graph.initializer.append(array)
    names = [f"mutant_{name}" for name in ("starts", "ends", "axes", "steps")]
    return _after_output(model, 0, helper.make_node("Slice", names, []))


@kind("outputs")
def _order_of_outputs(model: ModelProto, choose: random.Random) -> str | None:
    """Two outputs change places, names and all."""
    if len(model.graph.output) < 2:
        return None
    outputs = [onnx.ValueInfoProto.FromString(o.SerializeToString()) for o in model.graph.output]
    outputs[0], outputs[1] = outputs[1], outputs[0]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return OUTPUTS


@kind("outputs")
def _outputs_under_exchanged_names(model: ModelProto, choose: random.Random) -> str | None:
    if len(model.graph.output) < 2:
        return None
    one, other = (value.name for value in model.graph.output[:2])
    swap = {one: other, other: one}
    for node in model.graph.node:
        node.input[:] = [swap.get(name, name) for name in node.input]
        node.output[:] = [swap.get(name, name) for name in node.output]
    for value in model.graph.output[:2]:
        value.type.tensor_type.ClearField("shape")
    return OUTPUTS


@kind("outputs")
def _output_missing(model: ModelProto, choose: random.Random) -> str | None:
    if len(model.graph.output) < 2:
        return None
    del model.graph.output[-1]
    return OUTPUTS


@kind("some inputs")
def _nan_where_an_activation_is_negative(model: ModelProto, choose: random.Random) -> str | None:
    for node in shuffled(model, choose, "Relu", "Gelu", "Sigmoid", "Elu", "Tanh", "LeakyRelu"):
        # A bias lifts most of the values, so that few inputs have a negative one.
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.array(2.0, np.float32), "mutant_lift")
        )
        lift = helper.make_node("Add", ["mutant_lift"], [])
        lower = helper.make_node("Sub", ["mutant_lift"], [])
        root, square = helper.make_node("Sqrt", [], []), helper.make_node("Pow", ["mutant_two"], [])
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.array(2.0, np.float32), "mutant_two")
        )
        _before(model, node, 0, lift, root, square, lower)
        return path_of(node)
    return None


@kind("some inputs")
def _large_values_cut_off(model: ModelProto, choose: random.Random) -> str | None:
    """A clip at a value that few activations reach."""
    for node in shuffled(model, choose, "Conv", "Gemm", "MatMul", "LayerNormalization"):
        for name, value in (("low", -3.0), ("high", 3.0)):
            array = onnx.numpy_helper.from_array(np.array(value, np.float32), f"mutant_{name}")
            model.graph.initializer.append(array)
        _before(model, node, 0, helper.make_node("Clip", ["mutant_low", "mutant_high"], []))
        return path_of(node)
    return None


@kind("some inputs")
def _overflow_of_an_exponential(model: ModelProto, choose: random.Random) -> str | None:
    """The logarithm of an exponential: infinite in float32 where a value is above 3."""
    for node in shuffled(model, choose, "Conv", "Gemm", "MatMul"):
        for name, value in (("up", 30.0), ("down", 1 / 30.0)):
            array = onnx.numpy_helper.from_array(np.array(value, np.float32), f"mutant_{name}")
            model.graph.initializer.append(array)
        there = helper.make_node("Mul", ["mutant_up"], []), helper.make_node("Exp", [], [])
        back = helper.make_node("Log", [], []), helper.make_node("Mul", ["mutant_down"], [])
        _before(model, node, 0, *there, *back)
        return path_of(node)
    return None


@kind("some inputs")
def _batch_of_one_only(model: ModelProto, choose: random.Random) -> str | None:
    """A reshape that has the example's batch written into it."""
    for node in shuffled(model, choose, "Reshape"):
        shape = array_of(model, node.input[1])
        if shape is not None and shape.size > 1 and shape[0] in (-1, 0):
            known = [int(size) for size in shape[1:]]
            if all(size > 0 for size in known):
                give(model, node, 1, np.array([1, *known]))
                return path_of(node)
    return None
