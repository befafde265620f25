"""Shapes of every value in a graph, without computing any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp

from dropsurgery.errors import TraceError
from dropsurgery.graph.module import describe, graphs


class _Shapes(ShapeProp):
    """ShapeProp that says at which node of the user's network a shape did not fit."""

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except TraceError:
            raise
        except Exception as error:
            shapes = [
                tuple(value.meta["tensor_meta"].shape)
                for value in n.all_input_nodes
                if hasattr(value.meta.get("tensor_meta"), "shape")
            ]
            cause = error.__cause__ or error
            problem = str(cause).strip().splitlines()[0] if str(cause).strip() else repr(cause)
            raise TraceError(
                f"the example inputs do not fit the network: {problem}",
                where=f"{describe(n)}, input shapes {shapes}",
                fix="example inputs of the shape that the network was built for",
            ) from error


def record_shapes(module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Write `meta["tensor_meta"]` on every node of every graph of `module`.

    The graph is run on fake tensors: nothing is computed, no memory is taken for weights, no
    statistics are updated.

    Raises:
        TraceError: the inputs do not fit; the message names the node, its module and the shapes.
    """
    for graph in graphs(module):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in inputs]
        view = module if graph is module.graph else fx.GraphModule(module, graph)
        with torch.no_grad():
            _Shapes(view, fake_mode=mode).propagate(*fake)
        graph.owning_module = module
