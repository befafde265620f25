"""An ONNX file as the candidate of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dropsurgery.errors import VerifyError
from dropsurgery.graph.signature import first_line
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

    Raises:
        VerifyError: there is no such file, or it is not an ONNX model that onnxruntime can run.
        ProviderError: the provider is missing, or did not get all the work.
    """

    def __init__(self, path: Path, provider: str) -> None:
        self.path = path
        model = read_model(path)
        self._session = _session(path, provider)
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]
        metadata = {item.key: item.value for item in model.metadata_props}
        self.recorded: list[str] | None = None
        if "dropsurgery.outputs" in metadata:
            self.recorded = json.loads(metadata["dropsurgery.outputs"])
        self.placement = providers.confirm(
            provider,
            self._session.get_providers(),
            self._session.get_provider_graph_assignment_info(),
            providers.shape_nodes(model.graph),
        )

    def specs(self, reference: nn.Module) -> list[Spec]:
        """Return the inputs as the file declares them.

        Raises:
            VerifyError: an input is open along another axis than the batch.
        """
        tables = [m.num_embeddings for m in reference.modules() if isinstance(m, nn.Embedding)]
        specs = []
        for value in self._session.get_inputs():
            shape = [size if isinstance(size, int) else None for size in value.shape]
            if value.type not in _DTYPES or None in shape[1:]:
                raise VerifyError(
                    "no input can be made up for what the file declares",
                    where=f"input '{value.name}', {value.type} {value.shape}",
                    fix="pass inputs=, a tensor or a tuple of forward's arguments",
                )
            specs.append(
                Spec(value.name, _DTYPES[value.type], tuple(shape), min(tables, default=2))
            )
        return specs

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
    """Return the graph of a file without its external weights.

    Raises:
        VerifyError: there is no such file, or it is no ONNX model.
    """
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
    options = onnxruntime.SessionOptions()
    # Fatal only: what goes wrong is raised as well.
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, **providers.session_arguments(provider)
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
    """Return a tensor as onnxruntime takes it."""
    import onnxruntime

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def to_tensor(value: Any) -> Tensor:
    """Return a copy of what onnxruntime computed."""
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
