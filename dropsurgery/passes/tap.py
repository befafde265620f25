"""A network cut off at a layer: what `AttentiveCutMix` looks through."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from dropsurgery.errors import ArgumentTypeError, PassError
from dropsurgery.graph.module import graphs
from dropsurgery.graph.ops import writes_in_place
from dropsurgery.passes.base import Change, Pass, Plan, apply
from dropsurgery.passes.inference import DropUnused, KeepEval


@dataclass(frozen=True)
class Tap(Pass):
    """Let a network return what one of its layers computes, and compute nothing behind it.

    Args:
        at: dotted path of a module (`"layer4"`, whole or traced through), whose last call counts;
            or the name of a node.

    Raises:
        PassError: the network has two graphs (see `KeepEval`), has neither such a module nor such
            a node, or the module has several outputs.
    """

    at: str

    def __post_init__(self) -> None:
        if not isinstance(self.at, str):
            raise ArgumentTypeError(f"at is a module path or a node's name, got {self.at!r}")

    def check(self, module: fx.GraphModule) -> None:
        """Refuse a network with two graphs."""
        if len(graphs(module)) > 1:
            raise PassError(
                "Tap works on one graph, and this network has one for each mode",
                fix="ds.tap(model, at), or ds.apply(model, KeepEval(), Tap(at))",
            )

    def plan(self, module: fx.GraphModule) -> Plan:
        """Find the node."""
        node = _find(module, self.at)
        return Plan((Change(self.at, node.name, f"returns '{node.name}'"),), steps=(node.name,))

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Return the node, and erase what is not needed for it."""
        (name,) = plan.steps
        nodes = list(module.graph.nodes)
        node = next(n for n in nodes if n.name == name)
        behind = nodes[nodes.index(node) + 1 :]
        module.graph.output_node().args = (node,)
        for other in reversed(nodes):
            # A write into a value that is still read is no dead code.
            writes = other not in behind and writes_in_place(module, other)
            if not other.users and other.op not in ("placeholder", "output") and not writes:
                module.graph.erase_node(other)


def tap(model: nn.Module, at: str, *, example_inputs: Any = None) -> fx.GraphModule:
    """Return a network that computes what a layer of `model` computes, in eval mode.

    It shares the parameters and buffers of `model`, which is not changed, and holds only what the
    layer needs.

    Args:
        model: any `nn.Module`, or a GraphModule that dropsurgery returned.
        at: dotted path of a module (`"layer4"`, `"encoder.layers.5"`), or the name of a node.
        example_inputs: positional inputs, if tracing needs them.

    Raises:
        PassError: the network has no such layer, or it has several outputs.
        TraceError: the network cannot be turned into a graph.
    """
    passes = (KeepEval(), Tap(at), DropUnused())
    return apply(model, *passes, example_inputs=example_inputs).module


def _find(module: fx.GraphModule, at: str) -> fx.Node:
    """Return the node that holds what a module or a node of this name computes."""
    calls: dict[str, list[fx.Node]] = {}
    paths = set[str]()
    for node in module.graph.nodes:
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            paths.add(path)
            if path == at:
                calls.setdefault(key, []).append(node)
    names = [node.name for node in module.graph.nodes if node.op != "output"]
    if calls:
        inside = next(reversed(calls.values()))
        outputs = [n for n in inside if any(user not in inside for user in n.users)]
        if len(outputs) == 1:
            return outputs[0]
        raise PassError(
            f"'{at}' has {len(outputs)} outputs",
            where=", ".join(node.name for node in outputs),
            fix="the name of one of these nodes",
        )
    if at in names:
        return next(node for node in module.graph.nodes if node.name == at)
    near = difflib.get_close_matches(at, sorted(paths | set(names)), n=3, cutoff=0.4)
    raise PassError(
        f"the network has no module and no node '{at}' to tap",
        where=f"near it: {', '.join(near)}" if near else None,
        fix="a path from model.named_modules(), or a node of ds.trace(model).graph",
    )
