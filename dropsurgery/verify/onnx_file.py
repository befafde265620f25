"""An ONNX file as the candidate of a comparison."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dropsurgery.errors import VerifyError
from dropsurgery.graph.signature import first_line
from dropsurgery.onnx_random import constant_readers, random_nodes, train_mode_norms
from dropsurgery.verify import providers
from dropsurgery.verify.cases import Spec

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(uint16)": torch.uint16,
    "tensor(uint32)": torch.uint32,
    "tensor(uint64)": torch.uint64,
    "tensor(bool)": torch.bool,
}
T = TypeVar("T")
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


class OnnxRunner:
    """An ONNX file in an onnxruntime session.

    Args:
        path: the file.
        provider: "cpu" or "cuda".

    Attributes:
        inputs, outputs: the graph's names, in order.
        recorded: the names of inputs and outputs that dropsurgery's export wrote into the file, or
            None for a file of other origin.
        placement: which provider runs the nodes.
        draws: nodes that draw random numbers.
        train_norms: BatchNormalizations in training mode.

    Raises:
        VerifyError: there is no such file, or it is not an ONNX model that onnxruntime can run.
        ProviderError: the provider is missing, or did not get all the work.
    """

    def __init__(self, path: Path, provider: str) -> None:
        self.path = path
        model = read_model(path)
        metadata = {item.key: item.value for item in model.metadata_props}
        self.recorded: list[str] | None = None
        if "dropsurgery.outputs" in metadata:
            self.recorded = json.loads(metadata["dropsurgery.outputs"])
        self.draws = random_nodes(model)
        self.train_norms = train_mode_norms(model)
        shapes = providers.shape_nodes(model.graph)
        del model  # the weights are not held twice while the session reads them
        self._session = _session(path, provider)
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]
        self.placement = providers.confirm_session(provider, self._session, shapes)

    def specs(self, reference: nn.Module) -> list[Spec]:
        """Return the inputs as the file declares them.

        Raises:
            VerifyError: an input is no tensor of numbers.
        """
        tables = [m.num_embeddings for m in reference.modules() if isinstance(m, nn.Embedding)]
        for value in self._session.get_inputs():
            if value.type not in _DTYPES:
                raise VerifyError(
                    "no input can be made up for what the file declares",
                    where=f"input '{value.name}', {value.type} {value.shape}",
                    fix="pass inputs=, a tensor or a tuple of forward's arguments",
                )
        return [replace(spec, high=min(tables, default=2)) for spec in self.open_shapes()]

    def open_shapes(self) -> list[Spec]:
        """Return the inputs with names for their open sizes; an axis without one gets its own."""
        specs = []
        for value in self._session.get_inputs():
            shape = tuple(
                size if isinstance(size, int | str) else f"{value.name}.{axis}"
                for axis, size in enumerate(value.shape)
            )
            specs.append(Spec(value.name, _DTYPES.get(value.type, torch.float32), shape))
        return specs

    def frozen(self, path: str, weights: Collection[str]) -> list[str]:
        """Return, in words, the constants that stand where a module of the network draws.

        Args:
            path: the module's path.
            weights: names of constants that are the network's own.
        """
        readers = constant_readers(read_model(self.path), path, weights)
        return [f"{constant} read by {node}" for node, constant in readers]

    @property
    def open_batch(self) -> bool:
        """Whether the file accepts any batch size."""
        shapes = [value.shape for value in self._session.get_inputs()]
        return any(shape and not isinstance(shape[0], int) for shape in shapes)

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on tensors by name."""
        feeds = {name: to_value(tensor) for name, tensor in inputs.items()}
        results = self._session.run_with_ort_values(None, feeds)
        return {name: to_tensor(value) for name, value in zip(self.outputs, results, strict=True)}


def read_model(path: Path) -> Any:
    """Return the `onnx.ModelProto` of a file, without external data."""
    import onnx

    try:
        missing = "" if path.is_file() else "this is no file"
        missing = missing if path.exists() else "there is no such file"
    except OSError as error:  # a name that no file can have
        missing = f"the file cannot be read: {error.strerror or error}"
    if missing:
        raise VerifyError(missing, where=str(path), fix="check the path")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf has error classes of its own
        raise _not_onnx(path, error) from error
    if not model.graph.node and not model.graph.output:
        raise _not_onnx(path, None)
    return model


def _not_onnx(path: Path, error: Exception | None) -> VerifyError:
    return VerifyError(
        "the file is not a complete ONNX model" + (f": {first_line(error)}" if error else ""),
        where=f"{path} ({path.stat().st_size} bytes)",
        fix="export it again; a download may have been cut short",
    )


def _session(path: Path, provider: str) -> Any:
    import onnxruntime

    providers.check(provider)
    try:
        session = onnxruntime.InferenceSession(
            str(path), providers.session_options(), **providers.session_arguments(provider)
        )
    except Exception as error:
        raise VerifyError(
            f"onnxruntime cannot load the file: {first_line(error)}",
            where=str(path),
            fix="check that it is complete, that its .data file is beside it, and that its "
            "operators and dtypes exist on this provider",
        ) from error
    return session


def to_value(tensor: Tensor) -> Any:
    """Return a tensor as an OrtValue."""
    import onnxruntime

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def to_tensor(value: Any) -> Tensor:
    """Return an OrtValue as a tensor."""
    if value.data_type() == "tensor(bfloat16)":  # numpy has no such dtype
        return torch.utils.dlpack.from_dlpack(value._ortvalue).clone()
    return torch.from_numpy(value.numpy().copy())


def feeds_for(inputs: list[str], tensors: Mapping[str, T]) -> dict[str, T]:
    """Return a call's tensors under the names of a graph's inputs.

    Raises:
        VerifyError: their number differs.
    """
    if all(name in tensors for name in inputs):
        return {name: tensors[name] for name in inputs}
    if len(inputs) != len(tensors):
        raise VerifyError(
            f"the file takes {len(inputs)} inputs and the call has {len(tensors)} tensors",
            where=f"file: {', '.join(inputs)}; call: {', '.join(tensors)}",
            fix="pass inputs= with the tensors that the file was exported with",
        )
    return dict(zip(inputs, tensors.values(), strict=True))
