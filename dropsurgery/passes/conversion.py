"""What conversions of dropout did to a network, written down so that it can be taken back.

The log of it travels with the graph, on its output node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from dropsurgery.graph.inventory import Drop
from dropsurgery.graph.marks import CONVERTED, TAG
from dropsurgery.graph.module import fresh_path, graphs, place_like
from dropsurgery.passes.edits import (
    AddedCall,
    AddedInput,
    AddedLayer,
    Call,
    ChangedCall,
    Edit,
    ErasedCall,
    Ref,
    RemovedLayer,
    ScaledWeight,
    SetAttributes,
    SwappedLayer,
    Tags,
    map_arguments,
    put,
    put_class,
    scaled,
    visit,
)


@dataclass(frozen=True)
class Conversion:
    """One drop that was converted, and the edits that did it, in order."""

    drop: Drop
    what: str
    edits: tuple[Edit, ...]


def log_of(module: fx.GraphModule) -> tuple[Conversion, ...]:
    """Return the conversions that a network went through, in order."""
    found: tuple[Conversion, ...] = _output(module.graph).meta.get(CONVERTED, ())
    return found


def write_log(module: fx.GraphModule, log: tuple[Conversion, ...]) -> None:
    """Set the conversions that a network went through."""
    _output(module.graph).meta[CONVERTED] = log


def tags_of(module: fx.GraphModule) -> Tags:
    """Return the tagged nodes of each graph."""
    return {
        (index, node.meta[TAG]): node
        for index, graph in enumerate(graphs(module))
        for node in graph.nodes
        if TAG in node.meta
    }


class Recorder:
    """Makes edits that can be taken back, and remembers them.

    Args:
        module: the module, which belongs to the caller.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.edits: list[Edit] = []
        self._next = 1 + max((tag for _, tag in tags_of(module)), default=0)

    def swap(self, path: str, new: nn.Module) -> None:
        """Put a layer in place of the one at `path`, under all its names."""
        old = self.module.get_submodule(path)
        paths = _paths(self.module, old)
        new.train(old.training)
        for each in paths:
            put(self.module, each, new)
        self.edits.append(SwappedLayer(paths, old))

    def set(self, path: str, *, cls: type[nn.Module] | None = None, **values: Any) -> None:
        """Set attributes of the layer at `path`, and its class."""
        layer = self.module.get_submodule(path)
        before = tuple((name, getattr(layer, name)) for name in values if name in layer.__dict__)
        new = tuple(name for name in values if name not in layer.__dict__)
        self.edits.append(SetAttributes(path, before, new, type(layer)))
        put_class(self.module, path, cls or type(layer))
        for name, value in values.items():
            setattr(layer, name, value)

    def scale(self, path: str, factor: float) -> None:
        """Multiply the weight of the layer at `path`."""
        layer: Any = self.module.get_submodule(path)
        self.edits.append(ScaledWeight(path, factor, layer.weight))
        layer.weight = nn.Parameter(scaled(layer.weight, factor), layer.weight.requires_grad)

    def erase(self, node: fx.Node, index: int) -> None:
        """Take a call out: its users read its first input."""
        source = node.all_input_nodes[0]
        users = tuple((self._tag(user), _visits(user, node)) for user in node.users)
        edit = ErasedCall(
            index, self._tag(node), self._call(node), self._tag(source), self._tag(node.next), users
        )
        self.edits.append(edit)
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)

    def change(self, node: fx.Node, index: int, target: Any, args: Any, kwargs: Any) -> None:
        """Make a node a call of a function, or of the layer at a path."""
        self.edits.append(ChangedCall(index, self._tag(node), self._call(node)))
        stack = dict(node.meta.get("nn_module_stack") or {})
        if node.op == "call_module":
            stack = {key: value for key, value in stack.items() if value[0] != node.target}
        node.op = "call_module" if isinstance(target, str) else "call_function"
        if isinstance(target, str):
            stack[target] = (target, type(self.module.get_submodule(target)))
        node.target, node.args, node.kwargs = target, args, kwargs
        node.meta["nn_module_stack"] = stack

    def add_layer(self, prefix: str, name: str, layer: nn.Module) -> str:
        """Put a layer under a fresh name into the module at `prefix`; return its path."""
        owner = self.module.get_submodule(prefix)
        path = fresh_path(owner, prefix, name)
        layer.train(owner.training)
        owner.add_module(path.rpartition(".")[2], layer)
        self.edits.append(AddedLayer(path))
        return path

    def insert(self, path: str, source: fx.Node, readers: Iterable[fx.Node], index: int) -> fx.Node:
        """Call the layer at `path` on a value, for these of its readers."""
        chosen = list(readers)
        order = {node: number for number, node in enumerate(source.graph.nodes)}
        first = min(chosen, key=order.__getitem__)
        with source.graph.inserting_before(first):
            node = source.graph.call_module(path, (source,))
        place_like(node, first)
        for reader in chosen:
            reader.replace_input_with(source, node)
        self.edits.append(AddedCall(index, self._tag(node), self._tag(source)))
        return node

    def add_input(self, name: str, index: int, meta: dict[str, Any]) -> fx.Node:
        """Add an input behind the last one of a graph."""
        graph = graphs(self.module)[index]
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            placeholder = graph.placeholder(name)
        placeholder.meta.update(meta)
        self.edits.append(AddedInput(index, self._tag(placeholder)))
        return placeholder

    def remove_unused(self, layers: Iterable[nn.Module]) -> dict[int, RemovedLayer]:
        """Take layers that nothing uses out of the module tree, under all their names.

        Returns:
            What takes each of them back, by the id of the layer.
        """
        calls = (n for g in graphs(self.module) for n in g.nodes if n.op == "call_module")
        called = {id(self.module.get_submodule(str(node.target))) for node in calls}
        in_use = [p for p, leaf in self.module.named_modules() if id(leaf) in called and p]
        loose = {id(layer) for layer in layers} - called
        places: dict[int, list[tuple[str, str, tuple[str, ...]]]] = {}
        follows: dict[int, tuple[nn.Module, bool]] = {}
        for path, layer in list(self.module.named_modules(remove_duplicate=False)):
            # A layer inside a leaf is the leaf's own, whoever else called it.
            if id(layer) not in loose or any(path.startswith(f"{leaf}.") for leaf in in_use):
                continue
            parent, _, name = path.rpartition(".")
            owner = self.module.get_submodule(parent)
            names = list(owner._modules)
            if name not in names:
                continue  # its owner stands at several paths, and was visited
            behind = tuple(names[names.index(name) + 1 :])
            places.setdefault(id(layer), []).append((parent, name, behind))
            follows[id(layer)] = (layer, layer.training == owner.training)
            self.module.delete_submodule(path)
        return {
            key: RemovedLayer(tuple(reversed(found)), *follows[key])
            for key, found in places.items()
        }

    def _call(self, node: fx.Node) -> Call:
        meta = {key: value for key, value in node.meta.items() if key != "stack_trace"}
        args, kwargs = map_arguments(
            (node.args, node.kwargs),
            lambda leaf: Ref(self._tag(leaf)) if isinstance(leaf, fx.Node) else leaf,
        )
        return Call(
            node.op, node.target, tuple(args), dict(kwargs), node.name, meta, node.stack_trace
        )

    def _tag(self, node: fx.Node) -> int:
        if TAG not in node.meta:
            node.meta[TAG] = self._next
            self._next += 1
        tag: int = node.meta[TAG]
        return tag


def _paths(module: nn.Module, layer: nn.Module) -> tuple[str, ...]:
    named = module.named_modules(remove_duplicate=False)
    return tuple(path for path, found in named if found is layer)


def _output(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def _visits(user: fx.Node, node: fx.Node) -> tuple[int, ...]:
    """Return which of the nodes in a user's arguments are `node`, by number."""
    found: list[int] = []
    visit(user, lambda number, each: found.append(number) if each is node else None)
    return tuple(found)
