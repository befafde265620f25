"""What `ds.slim` makes of one model, and how exact that is."""

from __future__ import annotations

import copy
import re
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

import dropsurgery as ds
from benchmarks.slim.counting import TooLarge, network, norm_calls, onnx_counts, told
from benchmarks.zoo.catalogue import Entry
from benchmarks.zoo.checks import tensors_of
from dropsurgery.surgery import SLIM

Row = dict[str, Any]


def measure(entry: Entry, with_onnx: bool) -> Row:
    """Return what slim leaves of a model, why, and its float64 error.

    Args:
        entry: the model.
        with_onnx: also export the slimmed network, if the original has BatchNorms.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row: Row = {"source": entry.source, "family": entry.family, "name": entry.name, "status": "ok"}
    try:
        model, x = network(entry)
        row["slim"] = slimmed(copy.deepcopy(model).double(), x.double())
        if with_onnx and row["slim"]["norms"][0]:
            with told(row, "onnx"):
                row["onnx"] = exported(model, x)
        if row["slim"]["norms"][0]:
            model, x = network(entry, signs=True)
            row["signs"] = slimmed(model.double(), x.double())
    except TooLarge:
        row["large"] = True
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        text = " ".join(str(error).split())
        row.update(status="error", error=f"{type(error).__name__}: {text[:300]} ({where})")
    return row


def slimmed(model: nn.Module, x: Tensor) -> Row:
    """Return counts before and after, and the largest relative error of the slimmed network.

    Args:
        model: a network in float64.
        x: its input, in float64.
    """
    before = ds.trace(model, example_inputs=x)
    start = time.perf_counter()
    result = ds.apply(model, *SLIM, example_inputs=x)
    seconds = time.perf_counter() - start
    found: Row = {
        "nodes": [count(before), count(result.module)],
        "norms": [norm_calls(before, x), norm_calls(result.module, x)],
        "parameters": [parameters(model), parameters(result.module)],
        "seconds": round(seconds, 2),
    }
    if found["norms"][1]:
        found["reasons"] = dict(Counter(general(s.reason) for s in result.skipped))
    with torch.no_grad():
        pairs = zip(tensors_of(model(x)), tensors_of(result.module(x)), strict=True)
        found["error"] = max(relative(ours, own) for own, ours in pairs)
        found["own"] = rounding(model, x)
    return found


def rounding(model: nn.Module, x: Tensor) -> float:
    """Return how far an output moves where each input moves by the rounding of float64."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    moved = x * (1.0 + noise * torch.finfo(x.dtype).eps / 2)
    pairs = zip(tensors_of(model(x)), tensors_of(model(moved)), strict=True)
    return max(relative(other, own) for own, other in pairs)


def exported(model: nn.Module, x: Tensor) -> Row:
    """Return the nodes and BatchNorms of the slimmed network's ONNX file."""
    net = ds.slim(model, example_inputs=x)
    with tempfile.TemporaryDirectory() as folder:
        path = ds.export_onnx(net, Path(folder) / "slim.onnx", x, dynamic_batch=False)
        return onnx_counts(onnx.load(path, load_external_data=False))


def count(module: fx.GraphModule) -> int:
    """Return how many calls a graph makes."""
    return sum(node.op.startswith("call") for node in module.graph.nodes)


def parameters(module: nn.Module) -> int:
    """Return how many numbers the parameters and buffers of a network hold."""
    return sum(t.numel() for t in (*module.parameters(), *module.buffers()))


def relative(value: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value; NaN and infinities must agree."""
    if not torch.equal(value.isfinite(), expected.isfinite()):
        return float("inf")
    value, expected = value.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0)
    if not expected.is_floating_point():
        return float(not torch.equal(value, expected))
    scale = float(expected.abs().max()) or 1.0
    return float((value - expected).abs().max()) / scale


def general(reason: str) -> str:
    """Return a reason without names and numbers, so that like reasons can be counted."""
    text = re.sub(r"'[^']*'", "'…'", reason)
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", text)
