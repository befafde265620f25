"""An ONNX file as the candidate of a comparison."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

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
        level: how far onnxruntime optimises the graph; see `providers.LEVELS`.

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

    def __init__(self, path: Path, provider: str, level: str = providers.LEVELS[-1]) -> None:
        self.path = path
        file = read_onnx(path)
        self.recorded = recorded_names(file, "dropsurgery.outputs")
        self.draws = random_nodes(file.model)
        self.train_norms = train_mode_norms(file.model)
        shapes, real = providers.shape_nodes(file.model.graph), file.real
        del file  # the weights are not held twice while the session reads them
        self._session = _session(real, provider, level)
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
        readers = constant_readers(read_onnx(self.path).model, path, weights)
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


def _session(path: Path, provider: str, level: str) -> Any:
    import onnxruntime

    providers.check(provider)
    try:
        session = onnxruntime.InferenceSession(
            str(path), providers.session_options(level), **providers.session_arguments(provider)
        )
    except Exception as error:
        raise VerifyError(
            f"onnxruntime cannot load the file: {first_line(error)}",
            where=str(path),
            fix="check that its operators and dtypes exist on this provider",
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
