"""Shapes of every value in a graph, without computing any of them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _NormBase

from dropsurgery.errors import TraceError
from dropsurgery.graph.module import describe, graphs


class _Shapes(ShapeProp):
    """ShapeProp that says at which node of the user's network a shape did not fit."""

    def run_node(self, n: fx.Node) -> Any:
        try:
            return self._as_computed(n, super().run_node(n))
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

    def _as_computed(self, node: fx.Node, result: Any) -> Any:
        """Give a BatchNorm's fake output the layout of the real one: dense.

        Fake tensors keep the input's strides, over which a later `view` would stumble.
        """
        if node.op == "call_module" and isinstance(result, Tensor):
            called = self.module.get_submodule(str(node.target))
            dense = result.is_contiguous() or (
                result.dim() == 4 and result.is_contiguous(memory_format=torch.channels_last)
            )
            if isinstance(called, _NormBase) and not dense:
                return result.contiguous()
        return result


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
        shapes = _Shapes(view, fake_mode=mode)
        # fx would add the node to the message, which names it already, and print the traceback.
        shapes.extra_traceback = False
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            shapes.propagate(*fake)
        graph.owning_module = module
