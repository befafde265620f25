"""Which nodes of an ONNX graph draw random numbers, by the operators' own schemas.

onnx calls every operator that holds a graph non-deterministic (If, Loop, Scan, and AffineGrid by
way of an If in its definition). Whether such a node draws depends on what it holds, so bodies are
walked through, of functions too, whether the file defines them or the standard does.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_SCOPES = "pkg.torch.onnx.name_scopes"
_LATEST = 2**31 - 1


@dataclass(frozen=True)
class Found:
    """A node that was looked for.

    Attributes:
        name: its name in the file; that of the node around it where it is part of a function.
        op_type: what it computes.
        path: dotted path of the module that it stems from; "" where the file does not tell.
    """

    name: str
    op_type: str
    path: str

    def __str__(self) -> str:
        place = f" in module '{self.path}'" if self.path else ""
        return f"{self.name or 'a node without a name'} ({self.op_type}){place}"


@dataclass(frozen=True)
class _Scope:
    """What is known where a node stands: constants by name, versions of operators by domain."""

    constants: Mapping[str, Any]
    opsets: Mapping[str, int]


def op_draws(op_type: str, domain: str = "", opset: int = _LATEST) -> bool:
    """Say whether an operator by itself draws, whatever graphs a node of it may hold.

    Operators that no schema is known of, those of other vendors, count as deterministic. So does
    Dropout here, which draws in training mode only (`random_nodes` looks).
    """
    import onnx

    try:
        schema: Any = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return False
    if schema.node_determinism != onnx.defs.OpSchema.NodeDeterminism.NonDeterministic:
        return False
    kinds = onnx.defs.OpSchema.AttrType
    if any(a.type in (kinds.GRAPH, kinds.GRAPHS) for a in schema.attributes.values()):
        return False
    if schema.has_function:
        body = schema.function_body.node
        return any(op_draws(inner.op_type, inner.domain) for inner in _inside(body))
    return op_type != "Dropout"


def random_nodes(model: Any) -> list[Found]:
    """Return the nodes of an `onnx.ModelProto` that draw at run time, in order."""
    return [_found(node, outer) for node, outer, scope in _walk(model) if _draws(node, scope)]


def train_mode_norms(model: Any) -> list[Found]:
    """Return the BatchNormalizations that use the statistics of the batch, in order."""
    return [
        _found(node, outer)
        for node, outer, _ in _walk(model)
        if node.op_type == "BatchNormalization"
        and any(a.name == "training_mode" and a.i for a in node.attribute)
    ]


def constant_readers(model: Any, path: str, known: Collection[str]) -> list[tuple[Found, str]]:
    """Return the nodes of a module that read a constant tensor which is none of its weights.

    Args:
        model: an `onnx.ModelProto`.
        path: the module's path.
        known: names of weights that are not looked for.
    """
    found = []
    for node, outer, scope in _walk(model):
        here = _found(node, outer)
        if here.path == path or here.name.startswith(f"{path}/"):
            for name in node.input:
                tensor = scope.constants.get(name)
                if tensor is not None and name not in known and _size(tensor) > 1:
                    found.append((here, f"{name or '?'} {list(tensor.dims)}"))
    return found


def module_path(node: Any) -> str:
    """Return the path of the module that a node stems from; "" where the file does not tell."""
    for item in node.metadata_props:
        if item.key == _SCOPES:
            try:
                scopes = ast.literal_eval(item.value)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                return ""  # anything may stand in a file
            named = isinstance(scopes, list) and len(scopes) > 1 and isinstance(scopes[-2], str)
            return scopes[-2] if named else ""
    return ""


def _found(node: Any, outer: Any) -> Found:
    return Found(outer.name or node.name, node.op_type, module_path(outer) or module_path(node))


def _walk(model: Any) -> Iterator[tuple[Any, Any, _Scope]]:
    """Yield every node, the node in the file that it is part of, and what is known there."""
    functions = {(f.domain, f.name): f for f in model.functions}

    def graph(body: Any, around: _Scope, depth: int) -> Iterator[tuple[Any, Any, _Scope]]:
        own = {tensor.name: tensor for tensor in getattr(body, "initializer", ())}
        scope = _Scope({**around.constants, **own, **_constants(body.node)}, around.opsets)
        for node in body.node:
            yield node, node, scope
            for nested in _bodies(node):
                yield from graph(nested, scope, depth)
            called = functions.get((node.domain, node.op_type))
            if called is not None and depth < len(functions):
                inner = _Scope({}, {item.domain: item.version for item in called.opset_import})
                for part, _, known in graph(called, inner, depth + 1):
                    yield part, node, known

    opsets = {item.domain: item.version for item in model.opset_import}
    yield from graph(model.graph, _Scope({}, opsets), 0)


def _constants(nodes: Any) -> dict[str, Any]:
    return {
        node.output[0]: attribute.t
        for node in nodes
        if node.op_type == "Constant" and node.output
        for attribute in node.attribute
        if attribute.name == "value"
    }


def _bodies(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        yield from (nested for nested in [attribute.g, *attribute.graphs] if nested.node)


def _inside(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        yield node
        for nested in _bodies(node):
            yield from _inside(nested.node)


def _draws(node: Any, scope: _Scope) -> bool:
    if node.op_type == "Dropout" and not node.domain:
        return _trains(node, scope)
    return op_draws(node.op_type, node.domain, scope.opsets.get(node.domain, _LATEST))


def _trains(node: Any, scope: _Scope) -> bool:
    """Say whether a Dropout may draw: its third input is given and not constantly false."""
    inputs = [*node.input, "", "", ""]
    if not inputs[2]:
        return False
    known = scope.constants
    return _value(known.get(inputs[2])) is not False and _value(known.get(inputs[1])) != 0.0


def _value(tensor: Any) -> bool | float | None:
    """Return a constant of one element, or None for what is not known."""
    from onnx import TensorProto, numpy_helper

    if tensor is None or _size(tensor) != 1 or tensor.data_location == TensorProto.EXTERNAL:
        return None
    value: bool | float = numpy_helper.to_array(tensor).reshape(()).item()
    return value


def _size(tensor: Any) -> int:
    size = 1
    for length in tensor.dims:
        size *= length
    return size
