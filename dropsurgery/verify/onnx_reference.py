"""An ONNX file as the reference of a comparison.

The yardstick is the same as for a module: onnxruntime's own run of the file, measured against a
float64 run of it. onnxruntime has no float64 kernels for convolutions, so the float64 run is made
by onnx's reference evaluator, in numpy, on a copy of the graph in which every floating-point
weight, constant, cast and declared type is float64.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from inspect import Parameter
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropsurgery.errors import VerifyError
from dropsurgery.onnx_reader import read_onnx
from dropsurgery.onnx_structure import bodies
from dropsurgery.verify.onnx_file import OnnxRunner

# onnx.TensorProto.DataType
_FLOAT, _FLOAT16, _DOUBLE, _BFLOAT16 = 1, 10, 11, 16
_NARROW = {_FLOAT: torch.float32, _FLOAT16: torch.float16, _BFLOAT16: torch.bfloat16}
_TYPE_ATTRIBUTES = {"to", "dtype"}


class OnnxModule(nn.Module):
    """An ONNX file that is called like a module; its forward takes the file's inputs by name.

    onnxruntime runs it on the CPU, and onnx's reference evaluator where the float64 mode of
    `Float64` is on. It has no weights of its own, only an empty parameter of each floating-point
    dtype that the file's weights have, which says how exact they are. Its float64 run, unlike a
    module's, holds the weights a second time, in float64.

    Args:
        path: the file.

    Attributes:
        specs: the inputs as the file declares them.

    Raises:
        OnnxFileError: the file cannot be read.
        VerifyError: onnxruntime cannot run it, or it draws random numbers.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        path = Path(path)
        runner = OnnxRunner(path, "cpu")
        if runner.draws:
            raise VerifyError(
                "the reference draws random numbers",
                where=f"{path}: {', '.join(map(str, runner.draws[:5]))}",
                fix="take the randomness out, or make its noise an input",
            )
        self.eval()
        self.specs = runner.open_shapes()
        for dtype in sorted({_NARROW[kind] for kind in _narrow_types(path)}, key=str):
            name = str(dtype).removeprefix("torch.")
            self.register_parameter(name, nn.Parameter(torch.empty(0, dtype=dtype)))
        names = list(_identifiers(runner.inputs))
        arguments = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        taken = inspect.Signature(arguments)
        wide = _Float64Run(path)

        def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            tensors = taken.bind(*args, **kwargs).arguments.values()
            feeds = dict(zip(runner.inputs, tensors, strict=True))
            # Under the mode every new tensor is one of float64, whatever it was asked to be.
            if torch.empty(0, dtype=torch.float32).dtype == torch.float64:
                return wide(feeds)
            return runner(feeds)

        forward.__signature__ = taken  # type: ignore[attr-defined]
        self.forward = forward


def _identifiers(names: list[str]) -> Iterator[str]:
    """Yield names that Python's arguments may have, each once."""
    taken: set[str] = set()
    for name in names:
        clean = re.sub(r"\W|^(?=\d)", "_", name)
        if iskeyword(clean) or not clean.isidentifier():
            clean = "input"
        while clean in taken:
            clean += "_"
        taken.add(clean)
        yield clean


class _Float64Run:
    """The file in float64, made ready when it is first called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._evaluator: Any = None

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        if self._evaluator is None:
            from onnx.reference import ReferenceEvaluator

            self._evaluator = ReferenceEvaluator(_widened(self.path))
            self._check(feeds)
        results = self._evaluator.run(None, feeds)
        names = self._evaluator.output_names
        return {
            name: torch.from_numpy(value.copy()) for name, value in zip(names, results, strict=True)
        }

    def _check(self, feeds: dict[str, Any]) -> None:
        """Prove on the first input that no operator went back to fewer digits."""
        values = self._evaluator.run(None, feeds, intermediate=True)
        for name, value in values.items():
            if str(getattr(value, "dtype", "")) in ("float32", "float16", "bfloat16"):
                raise VerifyError(
                    f"the value {name!r} of the reference is computed in {value.dtype}",
                    where=str(self.path),
                    fix="compare with the module that the file was made from",
                )


def _narrow_types(path: Path) -> Iterator[int]:
    for _, body in bodies(read_onnx(path).model):
        for tensor in getattr(body, "initializer", ()):
            if tensor.data_type in _NARROW:
                yield tensor.data_type


def _widened(path: Path) -> Any:
    """Return the `onnx.ModelProto` of a file with every floating-point part in float64."""
    from onnx.external_data_helper import load_external_data_for_model

    file = read_onnx(path)
    load_external_data_for_model(file.model, str(file.real.parent))
    for _, body in bodies(file.model):
        for tensor in getattr(body, "initializer", ()):
            _widen(tensor)
        if hasattr(body, "initializer"):
            for value in (*body.input, *body.output, *body.value_info):
                if value.type.tensor_type.elem_type in _NARROW:
                    value.type.tensor_type.elem_type = _DOUBLE
        for node in body.node:
            _widen_node(node)
    return file.model


def _widen(tensor: Any) -> None:
    from onnx import numpy_helper

    if tensor.data_type in _NARROW:
        wide = numpy_helper.to_array(tensor).astype("float64")
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def _widen_node(node: Any) -> None:
    from onnx import helper

    for attribute in node.attribute:
        if attribute.HasField("t"):
            _widen(attribute.t)
        if attribute.name in _TYPE_ATTRIBUTES and attribute.i in _NARROW:
            attribute.i = _DOUBLE
        if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            many = attribute.name == "value_floats"
            numbers = list(attribute.floats) if many else [attribute.f]
            value = helper.make_tensor("", _DOUBLE, [len(numbers)] if many else [], numbers)
            attribute.CopyFrom(helper.make_attribute("value", value))
    if node.op_type == "ConstantOfShape" and not node.attribute:  # float32 unless it says so
        zero = helper.make_tensor("", _DOUBLE, [1], [0.0])
        node.attribute.append(helper.make_attribute("value", zero))
