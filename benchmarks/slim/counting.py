"""What both sides are measured by: one random network a model, BatchNorm calls, ONNX nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn
from torch.nn.modules import batchnorm

import dropsurgery as ds
from benchmarks.zoo import catalogue
from benchmarks.zoo.catalogue import Entry
from benchmarks.zoo.checks import randomize, smallest_input
from dropsurgery.graph.affine import is_norm

NEGATIVE = 0.05  # share of negative gains in a network of the second kind


class TooLarge(Exception):
    """A model of so many parameters that the sweep does not run it."""


def network(entry: Entry, *, signs: bool = False) -> tuple[nn.Module, Tensor]:
    """Return a model in eval mode with random BatchNorms, and two samples of the smallest input.

    Args:
        entry: the model.
        signs: let a few BatchNorm gains be negative, as in some trained networks.

    Raises:
        TooLarge: it has as many parameters as the sweep leaves out.
    """
    # Models that read their weights while they are built fail on "meta", and count as small.
    with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
        sketch = catalogue.build(entry, native=False)
        if sum(p.numel() for p in sketch.parameters()) >= catalogue.META_ONLY:  # type: ignore
            raise TooLarge
    torch.manual_seed(0)
    shape, size = smallest_input(entry)
    model = catalogue.build(entry, native=False, size=size)
    assert model is not None
    randomize(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(getattr(module, "running_mean", None), Tensor):
                continue
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(weight, Tensor):
                weight.uniform_(0.5, 1.5, generator=generator)
                if signs:
                    weight[torch.rand(weight.shape, generator=generator) < NEGATIVE] *= -1
            if isinstance(bias, Tensor):
                bias.uniform_(-0.2, 0.2, generator=generator)
    return model.eval(), torch.randn(2, *shape, generator=generator)


def norm_calls(model: nn.Module, x: Tensor) -> int:
    """Return how many BatchNorm calls a forward in eval makes; modules where it cannot be traced.

    Args:
        model: a network, or a graph of one, which is then read as it stands.
        x: an input.
    """
    try:
        graph = model if isinstance(model, fx.GraphModule) else ds.trace(model, example_inputs=x)
    except ds.DropsurgeryError:
        return sum(isinstance(module, batchnorm._BatchNorm) for module in model.modules())
    modules = dict(graph.named_modules(remove_duplicate=False))
    return sum(
        is_norm(node, modules[str(node.target)] if node.op == "call_module" else None)
        for node in graph.graph.nodes
        if node.op.startswith("call")
    )


def onnx_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Return the nodes of an ONNX graph, and how many of them are BatchNorms and convolutions."""
    kinds = [node.op_type for node in model.graph.node]
    return {
        "nodes": len(kinds),
        "norms": kinds.count("BatchNormalization"),
        "convolutions": kinds.count("Conv") + kinds.count("ConvTranspose"),
    }


@contextmanager
def told(row: dict[str, Any], key: str) -> Iterator[None]:
    """Write a failure of one measurement into the row, and go on."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        row[key] = {"error": f"{type(error).__name__}: {text}"[:300]}
