"""The values that example inputs give the nodes of a graph while it is being traced."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dropsurgery.graph.affine import fetch
from dropsurgery.graph.clone import clone_structure

if TYPE_CHECKING:
    from dropsurgery.graph.tracer import ModeTracer

_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")


class ExampleRun:
    """Runs as much of an unfinished graph as is asked about, on tensors without values.

    Sizes do not depend on the mode, so that everything runs in eval.

    Args:
        clone: the model that is traced, before its `training` flags are replaced.
        tracer: the tracer, whose graph it is.

    Attributes:
        active: whether something runs at the moment, so that nothing must be recorded.
    """

    def __init__(self, clone: nn.Module, tracer: ModeTracer) -> None:
        self.active = False
        self._tracer = tracer
        self._model = clone_structure(clone)
        for module in self._model.modules():
            module.__dict__["training"] = False
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._inputs = [
            self._mode.from_tensor(value) if isinstance(value, Tensor) else value
            for value in tracer.given.examples
        ]
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """Return a node's value, a tensor without values or a number; None where there is none."""
        wanted, stack = set[fx.Node](), [node]
        while stack:
            current = stack.pop()
            if current not in wanted and current not in self._values:
                wanted.add(current)
                stack += current.all_input_nodes
        random, silent = torch.get_rng_state(), _FAKE_LOG.disabled
        self.active = _FAKE_LOG.disabled = True
        try:
            with self._mode, torch.no_grad():
                for current in node.graph.nodes:
                    if current in wanted:
                        self._values[current] = self._run(current)
            return self._values[node]
        except Exception:  # whatever operations raise on inputs that do not fit
            return None
        finally:
            self.active, _FAKE_LOG.disabled = False, silent
            torch.set_rng_state(random)

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            places = [n for n in node.graph.nodes if n.op == "placeholder"]
            return self._inputs[places.index(node)]
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        target: Any = node.target
        if node.op == "get_attr":
            constant = self._tracer.constants.get(target)
            return fetch(self._model, target) if constant is None else constant
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "call_module":
            layer = self._tracer.layers.get(target)
            target = self._model.get_submodule(target) if layer is None else layer
        return target(*args, **kwargs)


def to_record(value: Any) -> Any:
    """Return an example input as JSON: a tensor as its shape and dtype."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return value if isinstance(value, bool | int | float | str) else None


def from_record(entry: Any) -> Any:
    """Return an example input of such a record; a tensor without values."""
    if not isinstance(entry, dict):
        return entry
    return torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
