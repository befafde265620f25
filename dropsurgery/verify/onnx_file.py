"""An ONNX file as the candidate of a comparison."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropsurgery.errors import OnnxFileError, VerifyError
from dropsurgery.graph.signature import first_line
from dropsurgery.onnx_random import constant_readers, random_nodes, train_mode_norms
from dropsurgery.onnx_reader import OnnxFile, read_onnx
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
        OnnxFileError: there is no such file, or it does not pass the checks of `read_onnx`.
        VerifyError: onnxruntime cannot run it.
        ProviderError: the provider is missing, or did not get all the work.
    """

    def __init__(self, path: Path, provider: str) -> None:
        self.path = path
        file = read_onnx(path)
        self._session = _session(file.real, provider)
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]
        self.recorded = recorded_names(file, "dropsurgery.outputs")
        self.draws = random_nodes(file.model)
        self.train_norms = train_mode_norms(file.model)
        self.placement = providers.confirm(
            provider,
            self._session.get_providers(),
            self._session.get_provider_graph_assignment_info(),
            providers.shape_nodes(file.model.graph),
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

    def frozen(self, path: str, weights: Collection[str]) -> list[str]:
        """Return, in words, the constants that stand where a module of the network draws.

        Args:
            path: the module's path.
            weights: names of constants that are the network's own.
        """
        readers = constant_readers(read_onnx(self.path).model, path, weights)
        return [f"{constant} read by {node}" for node, constant in readers]

    @property
    def open_batch(self) -> bool:
        """Whether the file accepts any batch size."""
        shapes = [value.shape for value in self._session.get_inputs()]
        return any(shape and not isinstance(shape[0], int) for shape in shapes)

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on tensors by name."""
        feeds = {name: _to_value(tensor) for name, tensor in inputs.items()}
        results = self._session.run_with_ort_values(None, feeds)
        return {name: _to_tensor(value) for name, value in zip(self.outputs, results, strict=True)}


def recorded_names(file: OnnxFile, key: str) -> list[str] | None:
    """Return names that an export wrote into the file, or None for a file of other origin."""
    text = file.metadata.get(key)
    if text is None:
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise OnnxFileError(
            f"the metadata are damaged: {key} is {text[:80]!r}",
            where=str(file.path),
            fix="export it again",
        )
    return names


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
            fix="check that its operators and dtypes exist on this provider",
        ) from error
    return session


def _to_value(tensor: Tensor) -> Any:
    import onnxruntime

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _to_tensor(value: Any) -> Tensor:
    if value.data_type() == "tensor(bfloat16)":  # numpy has no such dtype
        return torch.utils.dlpack.from_dlpack(value._ortvalue).clone()
    return torch.from_numpy(value.numpy().copy())
