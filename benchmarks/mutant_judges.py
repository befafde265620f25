"""Who says that a file is wrong: float64 as the truth, and the comparisons of other tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional as F

Outputs = dict[str, np.ndarray]


class _Conv(OpRun):
    op_domain = ""

    def _run(self, x, w, b=None, **given):  # type: ignore[no-untyped-def]
        rank = w.ndim - 2
        pads = list(given.get("pads") or [0] * 2 * rank)
        image = torch.tensor(x)
        padding = [p for i in reversed(range(rank)) for p in (pads[i], pads[i + rank])]
        image = F.pad(image, padding)
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
        bias = None if b is None else torch.tensor(b)
        result = conv(
            image,
            torch.tensor(w),
            bias,
            tuple(given.get("strides") or [1] * rank),
            0,
            tuple(given.get("dilations") or [1] * rank),
            given.get("group") or 1,
        )
        return (result.numpy(),)


_Conv.__name__ = "Conv"


class _Erf(OpRun):
    op_domain = ""

    def _run(self, x):  # type: ignore[no-untyped-def]
        return (torch.erf(torch.tensor(x)).numpy(),)


_Erf.__name__ = "Erf"


class _Gelu(OpRun):
    op_domain = ""

    def _run(self, x, approximate=None):  # type: ignore[no-untyped-def]
        tensor = torch.tensor(x)
        return (F.gelu(tensor, approximate=approximate or "none").numpy(),)


_Gelu.__name__ = "Gelu"


def double(model: ModelProto) -> ModelProto:
    """Return a copy of a graph in which every float32 is a float64."""
    wide = ModelProto.FromString(model.SerializeToString())
    del wide.graph.value_info[:]
    for tensor in wide.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in [*wide.graph.input, *wide.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in wide.graph.node:
        if node.op_type == "ConstantOfShape" and not node.attribute:  # zeros in float32
            zero = numpy_helper.from_array(np.zeros(1, np.float32))
            node.attribute.append(onnx.helper.make_attribute("value", zero))
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == 1:
                attribute.i = TensorProto.DOUBLE
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
                array = numpy_helper.to_array(attribute.t).astype(np.float64)
                attribute.t.CopyFrom(numpy_helper.from_array(array))
    return wide


def float64_runner(model: ModelProto) -> Callable[[Mapping[str, np.ndarray]], Outputs]:
    """Return a function that runs a graph in float64 with ONNX's own reference implementation.

    Convolutions and error functions are torch's, in float64: the reference's take minutes.
    """
    wide = double(model)
    session = ReferenceEvaluator(wide, new_ops=[_Conv, _Erf, _Gelu])
    names = [value.name for value in wide.graph.output]

    def run(feeds: Mapping[str, np.ndarray]) -> Outputs:
        floats = {
            name: array.astype(np.float64) if array.dtype == np.float32 else array
            for name, array in feeds.items()
        }
        with np.errstate(all="ignore"):
            return dict(zip(names, session.run(None, floats), strict=True))

    return run


def effect(exact: Outputs, mutant: Outputs | None, own: Mapping[str, float]) -> float:
    """Return how far a mutant is from the network in float64, in units of the network's own error.

    Args:
        exact: what the file computes in float64 before it was changed.
        mutant: what it computes afterwards; None where it does not run.
        own: root mean square of the network's own error in float32, by output.

    Returns:
        The largest ratio of root mean squares over the outputs; infinite where names, shapes or
        dtypes differ, or values that are not finite.
    """
    if mutant is None or list(exact) != list(mutant):
        return float("inf")
    worst = 0.0
    for name, before in exact.items():
        after = mutant[name]
        if before.shape != after.shape or not np.isfinite(after).all():
            return float("inf")
        difference = np.sqrt(np.mean(np.square(after - before)))
        size = np.sqrt(np.mean(np.square(before)))
        # An error of less than the spacing of float32 numbers is luck.
        rounding = max(own[name], np.finfo(np.float32).eps * size)
        worst = max(worst, float(difference / max(rounding, np.finfo(np.float64).tiny)))
    return worst


def _torch_verify(expected: Outputs, actual: Outputs) -> bool:
    """Say whether torch.onnx's verification would warn, by its own function and limits."""
    from torch.onnx._internal.exporter._verification import VerificationInfo

    for (name, one), other in zip(expected.items(), actual.values(), strict=False):
        info = VerificationInfo.from_tensors(name, torch.from_numpy(one), torch.from_numpy(other))
        if info.max_abs_diff >= 5e-3 or info.max_rel_diff >= 1e-1:
            return True
    return False


def _polygraphy(expected: Outputs, actual: Outputs) -> bool:
    """Say whether Polygraphy's comparison fails with the tolerances that it comes with."""
    from polygraphy.comparator import CompareFunc, IterationResult
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = [IterationResult(outputs=dict(outputs)) for outputs in (expected, actual)]
        found = CompareFunc.simple()(*results)
    missing = set(expected) != set(actual)
    return missing or not all(bool(match) for match in found.values())


def _allclose(expected: Outputs, actual: Outputs) -> bool:
    return list(expected) != list(actual) or not all(
        one.shape == actual[name].shape and np.allclose(one, actual[name], rtol=1e-3, atol=1e-4)
        for name, one in expected.items()
    )


def _cosine(expected: Outputs, actual: Outputs) -> bool:
    for name, one in expected.items():
        other = actual.get(name)
        if other is None or other.size != one.size:
            return True
        a, b = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
        if not a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-300) >= 0.99:
            return True
    return False


def _top_one(expected: Outputs, actual: Outputs) -> bool:
    name, one = next(iter(expected.items()))
    other = actual.get(name)
    if other is None or other.shape != one.shape:
        return True
    axis = 1 if one.ndim == 4 else -1
    return not np.array_equal(one.argmax(axis), other.argmax(axis))


JUDGES: dict[str, Callable[[Outputs, Outputs], bool]] = {
    "torch.onnx verify": _torch_verify,
    "Polygraphy": _polygraphy,
    "allclose(1e-3, 1e-4)": _allclose,
    "cosine ≥ .99": _cosine,
    "top-1": _top_one,
}


def verdicts(pairs: Sequence[tuple[Outputs, Outputs | None]]) -> dict[str, bool]:
    """Say which of the other comparisons catch a mutant, on at least one of the inputs.

    An input on which the file does not run is caught by all; a comparison that raises has caught.
    """
    caught: dict[str, bool] = {}
    for name, judge in JUDGES.items():
        caught[name] = any(
            actual is None or _or_raises(judge, expected, actual) for expected, actual in pairs
        )
    return caught


def _or_raises(judge: Callable[..., bool], expected: Any, actual: Any) -> bool:
    try:
        return judge(expected, actual)
    except Exception:
        return True


def onnx_runner(path: str) -> Callable[[Mapping[str, np.ndarray]], Outputs | None]:
    """Return a function that runs a file in onnxruntime, or returns None where it fails."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception:
        return lambda feeds: None
    names = [value.name for value in session.get_outputs()]

    def run(feeds: Mapping[str, np.ndarray]) -> Outputs | None:
        try:
            return dict(zip(names, session.run(None, dict(feeds)), strict=True))
        except Exception:
            return None

    return run


def checked(model: ModelProto) -> bool:
    """Say whether a graph passes onnx.checker."""
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return False
    return True
