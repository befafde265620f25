"""What analyses and passes need to know of a graph module: graphs, paths, history."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

HISTORY = "dropsurgery"
# Marks in node.meta, by which RemoveDropPath finds what InsertDropPath did.
INSERTED = "dropsurgery_inserted_drop_path"
NATIVE = "dropsurgery_native_drop_path"


@dataclass(frozen=True)
class Skip:
    """Something that was left alone.

    Attributes:
        module: dotted path of the module whose forward holds the node ("" is the root).
        node: name of the fx node.
        reason: why, in one line.
        by: the pass that left it alone; "" for an analysis.
    """

    module: str
    node: str
    reason: str
    by: str = ""


def graphs(module: fx.GraphModule) -> tuple[fx.Graph, ...]:
    """Return the graphs of a traced module: one, or (eval, train) where its forward has two."""
    train_graph = getattr(module, "train_graph", None)
    return (module.graph,) if train_graph is None else (module.graph, train_graph)


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module whose forward holds `node`; "" is the root.

    For a `call_module` node this is the module that *calls*, not the one that is called.
    """
    return owner_call(node)[0]


def owner_call(node: fx.Node) -> tuple[str, str]:
    """Return (path, call key) of the module call that holds `node`.

    The key tells two calls of one shared module apart: "blocks.0" and "blocks.0@1".
    """
    stack = list((node.meta.get("nn_module_stack") or {}).items())
    if node.op == "call_module" and stack and stack[-1][1][0] == node.target:
        stack.pop()
    if not stack:
        return "", ""
    key, (path, _) = stack[-1]
    return path, key


def place_like(new: fx.Node, neighbour: fx.Node) -> None:
    """Give a new node its neighbour's place in the module tree, so that errors and ONNX name it.

    A leaf call carries itself at the top of its stack; only the calling modules are copied, and a
    new leaf call gets its own entry.
    """
    stack = dict(neighbour.meta.get("nn_module_stack") or {})
    if neighbour.op == "call_module" and stack:
        key, (path, _) = next(reversed(stack.items()))
        if path == neighbour.target:
            del stack[key]
    if new.op == "call_module" and new.graph.owning_module is not None:
        called = new.graph.owning_module.get_submodule(str(new.target))
        stack[str(new.target)] = (str(new.target), type(called))
    new.meta["nn_module_stack"] = stack
    if neighbour.stack_trace:
        new.stack_trace = neighbour.stack_trace


def describe(node: fx.Node) -> str:
    """Return where a node is, for messages: its name, its module path and its source line."""
    path = module_path(node)
    text = f"node '{node.name}' in {path or 'the root module'}"
    line = (node.stack_trace or "").strip().splitlines()
    return f"{text} ({line[0].strip()})" if line else text


def called_module(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a `call_module` node calls, else None."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def nodes_by_target(module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Map the target of every `call_module` and `get_attr` node to the nodes that use it."""
    users: dict[str, list[fx.Node]] = {}
    for graph in graphs(module):
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                users.setdefault(str(node.target), []).append(node)
    return users


def history(module: fx.GraphModule) -> dict[str, Any]:
    """Return the record of a surgery: {"source": class of the original, "passes": [JSON, …]}."""
    record: dict[str, Any] = module.meta.setdefault(HISTORY, {"source": "", "passes": []})
    return record


def fresh_path(owner: nn.Module, prefix: str, name: str, taken: Collection[str] = ()) -> str:
    """Return the first free path of `prefix.name`, `prefix.name_1`, ….

    Args:
        owner: the module at `prefix`; an attribute of the name, even None, is not free.
        prefix: its dotted path, "" for the root.
        name: the name to start from.
        taken: paths that are promised already.
    """
    for number in itertools.count():
        candidate = f"{name}_{number}" if number else name
        path = f"{prefix}.{candidate}" if prefix else candidate
        if path not in taken and not hasattr(owner, candidate):
            return path
    raise AssertionError("the numbers never end")
