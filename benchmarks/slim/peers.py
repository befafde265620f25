"""What torch.fx's fuser, timm's re-parameterisation and the ONNX tools make of one model."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.slim.counting import TooLarge, network, norm_calls, onnx_counts, told
from benchmarks.zoo.catalogue import Entry

Row = dict[str, Any]


def measure(entry: Entry, with_onnx: bool) -> Row:
    """Return the BatchNorms of a model and what each tool leaves of them.

    Args:
        entry: the model.
        with_onnx: also export it if it has BatchNorms, and run onnxslim and onnxsim on the file.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row: Row = {"source": entry.source, "family": entry.family, "name": entry.name, "status": "ok"}
    try:
        model, x = network(entry)
        row["input"] = list(x.shape)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["norms"] = norm_calls(model, x)
        with told(row, "fx"), torch.no_grad():
            row["fx"] = {"norms": norm_calls(_fused(model), x)}
        with told(row, "timm"), torch.no_grad():
            row["timm"] = {"norms": norm_calls(_reparameterized(model), x)}
        if with_onnx and row["norms"]:
            onnx_tools(model, x, row)
    except TooLarge:
        row["large"] = True
    except Exception as error:
        row.update(status="error", error=f"{type(error).__name__}: {error}"[:300])
    return row


def _fused(model: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def _reparameterized(model: nn.Module) -> nn.Module:
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model)


def onnx_tools(model: nn.Module, x: Tensor, row: Row) -> None:
    """Export a model as torch does by default, and let onnxslim and onnxsim slim the file."""
    import onnxsim
    import onnxslim

    logging.disable(logging.WARNING)
    proto = None
    with told(row, "export"), contextlib.redirect_stdout(io.StringIO()):
        proto = torch.onnx.export(model, (x,), dynamo=True).model_proto  # type: ignore[union-attr]
        row["export"] = onnx_counts(proto)
    if proto is None:
        return
    with told(row, "onnxslim"):
        row["onnxslim"] = onnx_counts(onnxslim.slim(proto))
    with told(row, "onnxsim"):
        row["onnxsim"] = onnx_counts(onnxsim.simplify(proto)[0])
