"""An ONNX graph that shows all its values, and can be cut into pieces that are fed apart."""

from __future__ import annotations

import ast
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dropsurgery.graph.signature import first_line
from dropsurgery.onnx_reader import read_onnx
from dropsurgery.verify import providers
from dropsurgery.verify.onnx_file import to_tensor, to_value

# A message of protobuf holds less than 2 GiB.
_ONE_MESSAGE = 2**31 - 64 * 2**20
_SCOPES = "pkg.torch.onnx.name_scopes"
_FX_NODE = "pkg.torch.onnx.fx_node"
# The exporter's word for the lack of a module.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
_FED = "torch's "


class RunError(Exception):
    """A graph did not run.

    Args:
        message: what onnxruntime said.
        node: the name of the node that failed, or None.
    """

    def __init__(self, message: str, node: str | None) -> None:
        super().__init__(message)
        self.node = node


@dataclass(frozen=True)
class Node:
    """One step of a candidate.

    Attributes:
        name: its name in the file.
        op: its type.
        path: dotted path of the module that holds it; None where the file does not tell.
        source: (name, operation) of the node of torch's graph that it stems from; None likewise.
        inputs, outputs: names of values.
    """

    name: str
    op: str
    path: str | None
    source: tuple[str, str] | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class MarkedGraph:
    """An ONNX file of which every value can be seen.

    Args:
        path: the file.
        provider: "cpu" or "cuda".

    Attributes:
        model: the file's content, with its weights.
        nodes: the nodes that depend on the graph's inputs, in order of execution.
        inputs, outputs: names of the graph's inputs and outputs.
        metadata: the file's `metadata_props`.

    Raises:
        OnnxFileError: there is no such file, or it does not pass the checks of `read_onnx`.
    """

    def __init__(self, path: Path, provider: str) -> None:
        from onnx.external_data_helper import load_external_data_for_model

        file = read_onnx(path)
        self.path = path
        self.provider = provider
        self.model = file.model
        self.metadata = file.metadata
        if file.sidecars:
            load_external_data_for_model(self.model, str(file.real.parent))
        graph = self.model.graph
        del graph.value_info[:]  # sizes that a cut may change
        constants = {tensor.name for tensor in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in constants]
        self.outputs = [value.name for value in graph.output]
        self.nodes = list(_dependent(graph.node, self.inputs))
        self._inside = {name for node in graph.node for name in _used_inside(node)}
        self._whole: Any = None
        self._fed: tuple[frozenset[str], Any] = (frozenset(), None)

    @property
    def named(self) -> bool:
        """Whether the nodes tell which modules hold them."""
        return any(node.path is not None for node in self.nodes)

    @property
    def values(self) -> list[str]:
        """Names of all values that depend on the inputs, in order of execution."""
        return [name for node in self.nodes for name in node.outputs]

    def save_inputs(self, folder: Path) -> Path:
        """Write a graph with the same inputs that returns them, and return its path."""
        import onnx

        model = onnx.ModelProto()
        model.opset_import.extend(self.model.opset_import)
        model.ir_version = self.model.ir_version
        model.graph.name = "inputs"
        for value in self.model.graph.input:
            if value.name in self.inputs:
                model.graph.input.append(value)
                name = f"{value.name} again"
                model.graph.node.append(onnx.helper.make_node("Identity", [value.name], [name]))
                model.graph.output.append(onnx.ValueInfoProto(name=name))
        path = folder / "inputs.onnx"
        onnx.save(model, str(path))
        return path

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph and return every value.

        Raises:
            RunError: it does not run.
        """
        if self._whole is None:
            self._whole = self._session(self.model, self.values)
        return _run(self._whole, self.values, feeds)

    def run_before(self, name: str, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run only what stands before a node, and return every value of that.

        Raises:
            RunError: it does not run either.
        """
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        index = next((i for i, node in enumerate(model.graph.node) if node.name == name), 0)
        del model.graph.node[index:]
        made = {output for node in model.graph.node for output in node.output}
        values = [value for value in self.values if value in made]
        return _run(self._session(model, values), values, feeds) if values else {}

    def run_fed(self, feeds: Mapping[str, Tensor], cuts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph in pieces: whoever reads a value of `cuts` is given that tensor instead.

        Returns:
            The values of `cuts` as the graph computed them from what it was given.

        Raises:
            RunError: it does not run.
        """
        values = list(cuts)
        if self._fed[1] is None or self._fed[0] != frozenset(values):
            types = {name: _onnx_type(tensor) for name, tensor in cuts.items()}
            self._fed = frozenset(values), self._session(self._cut(types), values)
        given = {_FED + name: tensor for name, tensor in cuts.items()}
        wanted = {value.name for value in self._fed[1].get_inputs()}
        feeds = {name: tensor for name, tensor in {**feeds, **given}.items() if name in wanted}
        return _run(self._fed[1], values, feeds)

    def _cut(self, types: Mapping[str, int]) -> Any:
        """Return the graph with inputs of its own for whoever reads one of these values."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        cut = types.keys() - self._inside
        for node in graph.node:
            node.input[:] = [_FED + name if name in cut else name for name in node.input]
        used = {name for node in graph.node for name in node.input}
        for name in sorted(name for name in cut if _FED + name in used):
            graph.input.append(onnx.helper.make_tensor_value_info(_FED + name, types[name], None))
        return model

    def _session(self, model: Any, values: list[str]) -> Any:
        import onnx

        marked = onnx.ModelProto()
        marked.CopyFrom(model)
        del marked.graph.output[:]
        marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
        return session(marked, self.provider)


def session(model: Any, provider: str) -> Any:
    """Return an onnxruntime session of a model in memory that keeps every value as it is named.

    Raises:
        RunError: onnxruntime does not accept the model.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    arguments = providers.session_arguments(provider)
    try:
        if model.ByteSize() < _ONE_MESSAGE:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, **arguments)
        with tempfile.TemporaryDirectory() as folder:
            written = str(Path(folder) / "model.onnx")
            onnx.save(model, written, save_as_external_data=True, location="weights")
            return onnxruntime.InferenceSession(written, options, **arguments)
    except Exception as error:  # onnxruntime has error classes of its own
        raise RunError(first_line(error), _failed_node(str(error))) from error


def _run(session: Any, values: Iterable[str], feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    given = {name: to_value(tensor) for name, tensor in feeds.items()}
    names = list(values)
    try:
        results = session.run_with_ort_values(names, given)
    except Exception as error:
        raise RunError(first_line(error), _failed_node(str(error))) from error
    return {
        name: to_tensor(value)
        for name, value in zip(names, results, strict=True)
        if value.is_tensor() and value.has_value()
    }


def _failed_node(message: str) -> str | None:
    """Return the name of the node that onnxruntime blames, while it loads or runs a graph."""
    found = re.search(r"Name:\s?'([^']*)'", message) or re.search(r"Node ?\(([^)]*)\)", message)
    return found[1] if found else None


def _dependent(nodes: Iterable[Any], inputs: Iterable[str]) -> Iterator[Node]:
    """Yield the nodes that something given reaches."""
    reached = set(inputs)
    for index, proto in enumerate(nodes):
        names = [*proto.input, *_used_inside(proto)]
        if reached.isdisjoint(names):
            continue
        outputs = tuple(name for name in proto.output if name)
        reached.update(outputs)
        metadata = {item.key: item.value for item in proto.metadata_props}
        path, source = node_origin(metadata)
        name = proto.name or f"{proto.op_type}_{index}"
        inputs_of = tuple(name for name in names if name)
        yield Node(name, proto.op_type, path, source, inputs_of, outputs)


def node_origin(metadata: Mapping[str, str]) -> tuple[str | None, tuple[str, str] | None]:
    """Return the path of the module that holds a node, and what it was in torch's graph."""
    try:
        scopes = ast.literal_eval(metadata.get(_SCOPES, ""))
    except (SyntaxError, ValueError):
        return None, None
    if not isinstance(scopes, list) or not scopes or not all(isinstance(s, str) for s in scopes):
        return None, None
    path = scopes[-2] if len(scopes) > 1 else ""
    path = "" if path == _NO_MODULE else path
    target = re.search(r"target=torch\.ops\.aten\.(\w+)", metadata.get(_FX_NODE, ""))
    return path, (scopes[-1], target[1].rstrip("_")) if target else None


def _used_inside(proto: Any) -> set[str]:
    """Return the outer values that the branches and bodies of a node read."""
    names: set[str] = set()
    for attribute in proto.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            own = {value.name for value in graph.input}
            for node in graph.node:
                names.update({*node.input, *_used_inside(node)} - own)
                own.update(node.output)
            names.update({value.name for value in graph.output} - own)
    return names - {""}


def _onnx_type(tensor: Tensor) -> int:
    import onnx

    name = str(tensor.dtype).removeprefix("torch.")
    known = {"float32": "FLOAT", "float64": "DOUBLE"}
    kind: int = onnx.TensorProto.DataType.Value(known.get(name, name.upper()))
    return kind
