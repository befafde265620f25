"""Shapes of every value in a graph, without computing any of them."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _NormBase

from dropsurgery.errors import TraceError
from dropsurgery.graph.clone import clone_structure
from dropsurgery.graph.module import describe, graphs

# Under this key of node.meta stands what a run at two batch sizes showed: ("axis", k), …
BATCH_META = "dropsurgery_batch_axis"


class PlainArguments(fx.Interpreter):
    """Runs a graph as its code does: functions get lists that they may write to."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a node, none of them one of fx's immutable lists."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return plain(args), plain(kwargs)


def plain(value: Any) -> Any:
    """Return arguments with lists in the place of fx's immutable ones."""
    if isinstance(value, fx.immutable_collections.immutable_list):
        return [plain(item) for item in value]
    if type(value) is tuple:
        return tuple(plain(item) for item in value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


class _Shapes(PlainArguments, ShapeProp):
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


def record_batch(module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Write `meta["dropsurgery_batch_axis"]`, (kind, axis), where a second batch size tells it.

    The graphs run once more on fake tensors, with another number of entries on the leading axis
    of the inputs; `record_shapes` ran them with the first. Where they take no other number, or
    the inputs' leading axes differ, nothing is written.
    """
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    sizes = {value.shape[0] for value in tensors if value.dim() > 0}
    if len(sizes) != 1:
        return
    (first,) = sizes
    second = 2 * first  # what is divisible stays so
    for graph in graphs(module):
        shapes = _shapes_at(module, graph, inputs, second)
        for node in graph.nodes:
            before = getattr(node.meta.get("tensor_meta"), "shape", None)
            if before is not None and shapes.get(node) is not None:
                node.meta[BATCH_META] = _compared(tuple(before), shapes[node], first, second)


def _compared(
    before: tuple[int, ...], after: tuple[int, ...], first: int, second: int
) -> tuple[str, int | None]:
    """Say which axis has as many entries as the batch, from the shapes at two batch sizes."""
    if len(before) != len(after):
        return "mixed", None
    moved = [axis for axis in range(len(before)) if before[axis] != after[axis]]
    if not moved:
        return "unknown", None  # it may be a sum over the batch
    exact = (before[moved[0]], after[moved[0]]) == (first, second)
    return ("axis", moved[0]) if len(moved) == 1 and exact else ("mixed", None)


def _shapes_at(
    module: fx.GraphModule, graph: fx.Graph, inputs: Sequence[Any], size: int
) -> dict[fx.Node, tuple[int, ...]]:
    """Return shapes at another batch size; of no node where the network does not take it."""
    found: dict[fx.Node, tuple[int, ...]] = {}

    class Probe(PlainArguments):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                found[n] = tuple(result.shape)
            return result

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    owner = graph.owning_module
    log = logging.getLogger("torch._subclasses.fake_tensor")
    silent, log.disabled = log.disabled, True
    try:
        with mode, torch.no_grad():
            fake = [_resized(mode.from_tensor(v), size) if isinstance(v, Tensor) else v
                    for v in inputs]  # fmt: skip
            # Some layers keep what they computed; these must not keep tensors without values.
            probe = Probe(with_fake_buffers(module, mode), graph=graph)
            probe.extra_traceback = False
            probe.run(*fake)
    except Exception:  # whatever the network's operations raise on a size they do not take
        return {}
    finally:
        graph.owning_module = owner
        log.disabled = silent
    return found


def with_fake_buffers(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a structural clone whose buffers have no values: layers may write into them.

    Parameters are turned into fake tensors where they are read; a write such as that of
    `num_batches_tracked`, between real tensors alone, would be carried out.
    """
    clone = clone_structure(module)
    for layer in clone.modules():
        for name, buffer in layer._buffers.items():
            layer._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
    return clone


def _resized(value: Tensor, size: int) -> Tensor:
    return value if value.dim() == 0 else value.new_empty((size, *value.shape[1:]))
