"""Which axis of each value of a graph carries the batch.

Stochastic depth draws once for every entry of the batch, so that it must know where the batch is.
Nothing is run: every network input has its batch on axis 0, and one rule for each operation says
where it goes from there. Sizes are followed as expressions in the batch size, so that windows that
are merged with the batch are told from the batch, and are found again where they part.

What is said of a value holds for every batch size. It takes the forward to treat its inputs as
batched: a convolution's input of unknown rank has a batch axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, fx, nn

from dropsurgery.graph.affine import fetch
from dropsurgery.graph.batch.calls import Call, Found, Parts
from dropsurgery.graph.batch.layers import layer_output
from dropsurgery.graph.batch.rules import rule_of
from dropsurgery.graph.batch.sizes import BATCH_SIZE, Algebra, Size
from dropsurgery.graph.batch.values import Place, State, Value, tensor, unknown_rank
from dropsurgery.graph.channels import traced_shape
from dropsurgery.graph.shapes import BATCH_META


class BatchAxis(NamedTuple):
    """Where the batch is in a value.

    Attributes:
        kind: "axis": the entries of one axis are the samples, in their order. "none": the value
            does not depend on the batch, and no axis has its size. "mixed": it does, and no axis
            holds the samples one by one: windows and samples share an axis, or the samples were
            summed, attended over, or put into another order. "unknown": not proved.
        axis: the axis, counted from the front, for the kind "axis"; else None.
    """

    kind: Literal["axis", "none", "mixed", "unknown"]
    axis: int | None = None


_AXES = [BatchAxis("axis", axis) for axis in range(8)]
NONE, MIXED, UNKNOWN = BatchAxis("none"), BatchAxis("mixed"), BatchAxis("unknown")


def batch_axes(module: fx.GraphModule, graph: fx.Graph) -> dict[fx.Node, BatchAxis]:
    """Return for every node of a graph which axis of its value carries the batch.

    Of a tuple it is the axis on which all tensors in it have their batch. Where the network was
    traced with example inputs, what running it at two batch sizes showed fills the gaps.

    Args:
        module: the traced module.
        graph: one of its graphs. Nothing is run, and it is not changed.
    """
    return batch_axes_of(graph, dict(module.named_modules(remove_duplicate=False)))


def batch_axes_of(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[fx.Node, BatchAxis]:
    """The same, for a caller who has the modules by path ("" is the root)."""
    algebra = Algebra()
    known: dict[fx.Node, Found] = {}
    for node in graph.nodes:
        found = _follow(modules, node, known, algebra)
        known[node] = _with_traced_shape(node, found, algebra)
    return {node: _summary(known[node]) for node in graph.nodes}


def _follow(
    modules: Mapping[str, nn.Module], node: fx.Node, known: dict[fx.Node, Found], algebra: Algebra
) -> Found:
    """Return what is known of a node's value, given the values before it."""
    if node.op == "placeholder":
        return unknown_rank(node.name, Place(0), (BATCH_SIZE,))
    if node.op == "get_attr":
        value = fetch(modules[""], str(node.target))
        sizes = [Size(size) for size in value.shape] if isinstance(value, Tensor) else []
        return tensor(node.name, sizes, State.NONE)
    called = modules[str(node.target)] if node.op == "call_module" else None
    call = Call(node, called, known, algebra)
    if node.op == "output":
        (result,) = node.args
        one = call.find(result)
        return Parts(tuple(known[value] for value in node.all_input_nodes)) if one is None else one
    try:
        if called is not None:
            return layer_output(call, called)
        rule = rule_of(node.target)
        return call.unknown() if rule is None else rule(call)
    except IndexError:  # an axis that the tensor does not have: torch says so when it runs
        return call.unknown()


def _with_traced_shape(node: fx.Node, found: Found, algebra: Algebra) -> Found:
    """Use what is known of a node's value from example inputs: its shape, and its batch axis."""
    shape = traced_shape(node) if "tensor_meta" in node.meta else None
    if shape is None or not isinstance(found, Value):
        return found
    batch = found.batch
    probed = node.meta.get(BATCH_META)
    if probed is not None and batch is State.UNKNOWN:
        kind, axis = probed
        # Sizes do not tell whether samples' values are in it.
        batch = Place(axis, made=True) if kind == "axis" else _PROBED.get(kind, batch)
    if isinstance(batch, Place) and batch.axis >= len(shape):
        batch = State.UNKNOWN if shape else State.NONE
    sizes = [
        algebra.opaque("axis", node.name, a) if s is None else Size(s) for a, s in enumerate(shape)
    ]
    for axis, size in enumerate(found.sizes[: len(shape)]):
        if algebra.varies(size):
            sizes[axis] = size
    if isinstance(batch, Place):
        sizes[batch.axis] = batch.size
    elif batch in (State.UNKNOWN, State.BLENDED):
        sizes = [algebra.opaque("axis", node.name, a, varies=True) for a in range(len(shape))]
    return replace(tensor(found.name, sizes, batch), name=node.name)


_PROBED = {"none": State.NONE, "mixed": State.BLENDED}


def _summary(found: Found) -> BatchAxis:
    """Return a value's batch axis as others see it."""
    if isinstance(found, Parts):
        items: Any = found.items if found.each is None else (found.each,)
        kinds = {_summary(item) for item in items if item is not None}
        return kinds.pop() if len(kinds) == 1 else UNKNOWN
    if not isinstance(found, Value) or found.batch is State.NONE:
        return NONE
    if isinstance(found.batch, Place):
        axis = found.batch.axis
        if not found.batch.alone:
            return MIXED
        return _AXES[axis] if axis < len(_AXES) else BatchAxis("axis", axis)
    return UNKNOWN if found.batch is State.UNKNOWN else MIXED
