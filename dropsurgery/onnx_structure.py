"""Whether the graph of an ONNX file is one: names, order, nesting and sizes that it writes down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

from dropsurgery.errors import OnnxFileError, UnsafeFileError

MOST_NESTED = 16  # graphs within graphs: branches and loops
MOST_CALLS = 64  # functions that call functions
MOST_NODES = 1_000_000  # once every function is written out where it is called
MOST_BYTES = 2**31  # of a value whose shape the file writes down as a constant
# Which input of an operator is the shape, or the sizes, of its output.
_SHAPE_INPUT = {"ConstantOfShape": 0, "Expand": 1, "Resize": 3}
_SHAPE_ATTRIBUTE = {"RandomNormal", "RandomUniform"}
_LEAST_BYTES = 4  # of an element of theirs, nearly always

Key = tuple[str, str, str]


def bodies(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield (place, graph or function) for everything in a model that holds nodes.

    Raises:
        UnsafeFileError: graphs are nested too deep.
    """
    stack: list[tuple[str, Any, int]] = [("", model.graph, 0)]
    stack += [(f"function {_text(f.name)!r}, ", f, 0) for f in model.functions]
    for index, training in enumerate(model.training_info):
        place = f"training_info {index}, "
        stack += [(place, training.initialization, 0), (place, training.algorithm, 0)]
    while stack:
        place, body, depth = stack.pop()
        if depth > MOST_NESTED:
            raise UnsafeFileError(f"graphs are nested more than {MOST_NESTED} deep", where=place)
        yield place, body
        for node in body.node:
            for graph in _subgraphs(node):
                stack.append((f"{place}inside {_name(node)}, ", graph, depth + 1))


def check_structure(model: Any, where: str) -> None:
    """Refuse a model whose graph is none, or that writes down sizes beyond reason.

    Args:
        model: an `onnx.ModelProto`.
        where: the file, for messages.

    Raises:
        OnnxFileError: a cycle, a value that nothing makes, two values of one name.
        UnsafeFileError: nesting, functions or sizes without bounds.
    """
    try:
        for _, body in bodies(model):
            for node in body.node:
                _text(node.op_type), _text(node.domain), _text(node.name)
        for item in [*model.opset_import, *(o for f in model.functions for o in f.opset_import)]:
            if not 0 < item.version < 2**31:
                raise OnnxFileError(f"there is no version {item.version} of any operators")
        _check_functions(model)
        _check_body(model.graph, frozenset())
        for function in model.functions:
            _check_body(function, frozenset())
        _check_sizes(model)
    except OnnxFileError as error:
        place = f"{where}, {error.where.rstrip(', ')}" if error.where else where
        raise type(error)(error.problem, where=place, fix=error.fix) from error.__cause__


def _text(value: Any) -> str:
    # Protobuf hands over bytes where a text is not UTF-8.
    if not isinstance(value, str):
        raise OnnxFileError(f"the file holds text that is not UTF-8: {value!r:.80}")
    return value


def _name(node: Any) -> str:
    return f"node {_text(node.name)[:100]!r} ({_text(node.op_type)[:60]})"


def _subgraphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


# --- names and order -----------------------------------------------------------------------------


def _check_body(body: Any, outer: frozenset[str]) -> None:
    """Check the names of a graph or function, and that its nodes can run in some order."""
    is_graph = hasattr(body, "initializer")
    inputs = [_text(value.name if is_graph else value) for value in body.input]
    weights = [_text(tensor.name) for tensor in getattr(body, "initializer", ())]
    weights += [_text(item.values.name) for item in getattr(body, "sparse_initializer", ())]
    made = [_text(name) for node in body.node for name in node.output if name]
    # An initializer may give an input of the same name its default.
    for kind in (inputs, weights, [*{*inputs, *weights}, *made]):
        if twice := [name for name, count in Counter(kind).items() if count > 1]:
            raise OnnxFileError(
                f"two values bear the name {twice[0][:100]!r}",
                fix="export it again; names are unique in a graph",
            )
    known = {*outer, *inputs, *weights}
    needs = [_needs(node) for node in body.node]
    for node, names in zip(body.node, needs, strict=True):
        if lost := names - known - set(made):
            raise OnnxFileError(f"nothing makes the value {min(lost)[:100]!r}", where=_name(node))
    _check_order(body, needs, known)
    outputs = [_text(value.name if is_graph else value) for value in body.output]
    for name in outputs:
        if name not in known and name not in made:
            raise OnnxFileError(f"nothing makes the output {name[:100]!r}")
    for node in body.node:
        for graph in _subgraphs(node):
            _check_body(graph, frozenset({*known, *made}))


def _needs(node: Any) -> set[str]:
    """Return the values that a node reads, those that its subgraphs take from outside included."""
    names = {_text(name) for name in node.input if name}
    for graph in _subgraphs(node):
        own = {_text(value.name) for value in graph.input}
        own |= {_text(tensor.name) for tensor in graph.initializer}
        own |= {_text(sparse.values.name) for sparse in graph.sparse_initializer}
        own |= {_text(name) for inner in graph.node for name in inner.output}
        read = {_text(value.name) for value in graph.output}
        for inner in graph.node:
            read |= _needs(inner)
        names |= read - own
    return names


def _check_order(body: Any, needs: list[set[str]], known: set[str]) -> None:
    """Refuse a cycle: take out, again and again, the nodes whose inputs are all there."""
    waiting: dict[str, list[int]] = {}
    open_inputs = []
    for index, names in enumerate(needs):
        missing = names - known
        open_inputs.append(len(missing))
        for name in missing:
            waiting.setdefault(name, []).append(index)
    ready = [index for index, count in enumerate(open_inputs) if not count]
    done = 0
    while ready:
        node = body.node[ready.pop()]
        done += 1
        for name in node.output:
            for index in waiting.pop(name, ()):
                open_inputs[index] -= 1
                if not open_inputs[index]:
                    ready.append(index)
    if done < len(body.node):
        stuck = next(node for node, count in zip(body.node, open_inputs, strict=True) if count)
        raise OnnxFileError("the graph has a cycle", where=_name(stuck))


# --- functions -----------------------------------------------------------------------------------


def _key(item: Any, name: str) -> Key:
    return _text(item.domain), _text(name), _text(item.overload)


def _check_functions(model: Any) -> None:
    """Refuse functions that call themselves, or that are a graph without end once written out."""
    functions = {_key(function, function.name): function for function in model.functions}
    if len(functions) < len(model.functions):
        raise OnnxFileError("two functions bear one name")
    calls = {key: _calls(function, functions) for key, function in functions.items()}
    sizes: dict[Key, int] = {}
    depths: dict[Key, int] = {}
    callers: dict[Key, list[Key]] = {}
    open_calls = {key: len(called[1]) for key, called in calls.items()}
    for key, (_, called) in calls.items():
        for other in called:
            callers.setdefault(other, []).append(key)
    ready = [key for key, count in open_calls.items() if not count]
    while ready:
        key = ready.pop()
        own, called = calls[key]
        sizes[key] = own + sum(sizes[other] * count for other, count in called.items())
        depths[key] = 1 + max((depths[other] for other in called), default=0)
        for caller in callers.get(key, ()):
            open_calls[caller] -= 1
            if not open_calls[caller]:
                ready.append(caller)
    if len(sizes) < len(functions):
        name = min(set(functions) - set(sizes))[1]
        raise OnnxFileError(f"a function calls itself: {name[:100]!r}")
    if max(depths.values(), default=0) > MOST_CALLS:
        raise UnsafeFileError(f"functions call one another more than {MOST_CALLS} deep")
    own, called = _calls(model.graph, functions)
    total = own + sum(sizes[other] * count for other, count in called.items())
    if total > MOST_NODES:
        raise UnsafeFileError(f"the graph has {total} nodes once its functions are written out")


def _calls(body: Any, functions: dict[Key, Any]) -> tuple[int, Counter[Key]]:
    """Return how many nodes a body holds, and how often it calls each function."""
    own, called = 0, Counter[Key]()
    stack = [body]
    while stack:
        for node in stack.pop().node:
            own += 1
            stack += _subgraphs(node)
            key = _key(node, node.op_type)
            if key in functions:
                called[key] += 1
    return own, called


# --- sizes ---------------------------------------------------------------------------------------


def _check_sizes(model: Any) -> None:
    """Refuse shapes that the file writes down and that nobody has the memory for.

    Shapes that are computed are not seen here.
    """
    for value in model.graph.input:
        shape = value.type.tensor_type.shape
        sizes = [d.dim_value for d in shape.dim if d.HasField("dim_value")]
        _check_size(sizes, f"input {_text(value.name)!r}")
    for place, body in bodies(model):
        constants = dict(_constants(body))
        for node in body.node:
            index = _SHAPE_INPUT.get(node.op_type)
            if index is not None and len(node.input) > index:
                _check_size(constants.get(node.input[index], ()), place + _name(node))
            if node.op_type in _SHAPE_ATTRIBUTE:
                for attribute in node.attribute:
                    if attribute.name == "shape":
                        _check_size(attribute.ints, place + _name(node))


def _constants(body: Any) -> Iterator[tuple[str, list[int]]]:
    """Yield the short whole-number tensors of a body by name: those that can be shapes."""
    tensors = [(tensor.name, tensor) for tensor in getattr(body, "initializer", ())]
    for node in body.node:
        for attribute in node.attribute if node.op_type == "Constant" and node.output else ():
            if attribute.name == "value":
                tensors.append((node.output[0], attribute.t))
            elif attribute.name == "value_ints":
                yield node.output[0], list(attribute.ints)
    for name, tensor in tensors:
        if tensor.data_type == 7 and len(tensor.dims) == 1 and 0 < tensor.dims[0] <= 16:
            raw = tensor.raw_data
            whole = range(0, len(raw) - 7, 8)
            read = [int.from_bytes(raw[at : at + 8], "little", signed=True) for at in whole]
            yield name, read or list(tensor.int64_data)


def _check_size(sizes: Iterable[int], place: str) -> None:
    known = [size for size in sizes if size > 0]  # -1 and 0 stand for "as it comes"
    if prod(known) * _LEAST_BYTES > MOST_BYTES:
        raise UnsafeFileError(f"a value has the absurd shape {known[:8]}", where=place)
