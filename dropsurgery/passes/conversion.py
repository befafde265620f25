"""What a conversion of dropout did to a network, so that it can be taken back.

The log of it travels with the graph, on its output node. Every edit knows the nodes that it needs
by a tag in their meta, because names and positions change when a graph is copied or pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropsurgery.graph.clone import clone_structure
from dropsurgery.graph.inventory import Drop
from dropsurgery.graph.marks import CONVERTED, TAG
from dropsurgery.graph.module import fresh_path, graphs

Tags = dict[tuple[int, int], fx.Node]


@dataclass(frozen=True)
class _Ref:
    """Stands for a node in the recorded arguments of a call."""

    tag: int


@dataclass(frozen=True)
class SwappedLayer:
    """Another layer stands where one stood.

    Attributes:
        paths: where, under all its names.
        layer: the one that stood there.
    """

    paths: tuple[str, ...]
    layer: nn.Module

    def needs(self) -> Iterator[tuple[int, int]]:
        """Yield (graph, tag) of the nodes without which this cannot be undone: none."""
        yield from ()

    def undo(self, module: fx.GraphModule, tags: Tags) -> None:
        """Put the layer back, in the mode of the one that it replaces."""
        restored = clone_structure(self.layer)
        for path in self.paths:
            restored.train(module.get_submodule(path).training)
            _put(module, path, restored)


@dataclass(frozen=True)
class RemovedLayer:
    """A layer left the module tree.

    Attributes:
        places: (path of its parent, its name there, the names that stood after it).
        layer: the layer.
        follows: whether it was in its parent's mode.
    """

    places: tuple[tuple[str, str, tuple[str, ...]], ...]
    layer: nn.Module
    follows: bool

    def needs(self) -> Iterator[tuple[int, int]]:
        """Yield nothing: the tree is enough."""
        yield from ()

    def undo(self, module: fx.GraphModule, tags: Tags) -> None:
        """Put the layer back in its place."""
        restored = clone_structure(self.layer)
        for parent, name, behind in self.places:
            owner = module.get_submodule(parent)
            if self.follows:
                restored.train(owner.training)
            owner.add_module(name, restored)
            for later in behind:
                if later in owner._modules:
                    owner._modules[later] = owner._modules.pop(later)


@dataclass(frozen=True)
class SetAttributes:
    """Attributes of a layer, or its class, have another value.

    Attributes:
        path: the layer.
        values: name and value before.
        cls: its class before.
    """

    path: str
    values: tuple[tuple[str, Any], ...]
    cls: type[nn.Module]

    def needs(self) -> Iterator[tuple[int, int]]:
        """Yield nothing: the layer is enough."""
        yield from ()

    def undo(self, module: fx.GraphModule, tags: Tags) -> None:
        """Set what was."""
        layer = module.get_submodule(self.path)
        layer.__class__ = self.cls
        for name, value in self.values:
            setattr(layer, name, value)


@dataclass(frozen=True)
class ScaledWeight:
    """A weight was multiplied by a number.

    Attributes:
        path: the layer that has it.
        factor: the number.
        before: the weight as it was.
    """

    path: str
    factor: float
    before: nn.Parameter

    def needs(self) -> Iterator[tuple[int, int]]:
        """Yield nothing: the layer is enough."""
        yield from ()

    def undo(self, module: fx.GraphModule, tags: Tags) -> None:
        """Put the weight back; one that was trained since is divided by the factor."""
        layer: Any = module.get_submodule(self.path)
        weight = layer.weight
        if torch.equal(weight.detach(), scaled(self.before, self.factor).to(weight.device)):
            layer.weight = self.before
        else:
            layer.weight = nn.Parameter(scaled(weight, 1.0 / self.factor), weight.requires_grad)


@dataclass(frozen=True)
class _Call:
    """A node as it was: what `fx.Graph.create_node` needs, with tags in place of nodes."""

    op: str
    target: Any
    args: Any
    kwargs: Any
    name: str
    meta: dict[str, Any]
    stack_trace: str | None


@dataclass(frozen=True)
class ErasedCall:
    """A call was taken out; its users read its input instead.

    Attributes:
        graph: number of its graph.
        tag: its tag.
        call: the call.
        source: tag of its input.
        before: tag of the node that followed it.
        users: (tag, which of the nodes in its arguments) of what read it.
    """

    graph: int
    tag: int
    call: _Call
    source: int
    before: int
    users: tuple[tuple[int, tuple[int, ...]], ...]

    def needs(self) -> Iterator[tuple[int, int]]:
        """Yield the call's input and users."""
        yield self.graph, self.source
        for tag, _ in self.users:
            yield self.graph, tag

    def undo(self, module: fx.GraphModule, tags: Tags) -> None:
        """Make the call again, where it stood, and let its users read it."""
        graph = graphs(module)[self.graph]
        users = [(tags[self.graph, tag], visits) for tag, visits in self.users]
        behind = tags.get((self.graph, self.before))
        if behind is None:
            order = {node: index for index, node in enumerate(graph.nodes)}
            behind = min((user for user, _ in users), key=order.__getitem__)
        args, kwargs = _resolved((self.call.args, self.call.kwargs), self.graph, tags)
        taken = {node.name for node in graph.nodes}
        with graph.inserting_before(behind):
            node = graph.create_node(self.call.op, self.call.target, args, kwargs, self.call.name)
        if self.call.name not in taken:
            node.name = self.call.name  # fx keeps the names of erased nodes from being used again
        node.meta.update(self.call.meta)
        node.stack_trace = self.call.stack_trace
        source = tags[self.graph, self.source]
        for user, visits in users:
            _replace_at(user, visits, source, node)
        tags[self.graph, self.tag] = node


@dataclass(frozen=True)
class ChangedCall:
    """A call became another one, in its place and under its name.

    Attributes:
        graph: number of its graph.
        tag: its tag.
        call: the call before.
    """

    graph: int
    tag: int
    call: _Call

    def needs(self) -> Iterator[tuple[int, int]]:
        """Yield the node and what it read."""
        yield self.graph, self.tag
        for leaf in _leaves((self.call.args, self.call.kwargs)):
            if isinstance(leaf, _Ref):
                yield self.graph, leaf.tag

    def undo(self, module: fx.GraphModule, tags: Tags) -> None:
        """Make it the call that it was."""
        node = tags[self.graph, self.tag]
        args, kwargs = _resolved((self.call.args, self.call.kwargs), self.graph, tags)
        node.op, node.target, node.args, node.kwargs = self.call.op, self.call.target, args, kwargs
        node.meta.update(self.call.meta)


@dataclass(frozen=True)
class AddedInput:
    """A graph got another input.

    Attributes:
        graph: number of the graph.
        tag: tag of the placeholder.
    """

    graph: int
    tag: int

    def needs(self) -> Iterator[tuple[int, int]]:
        """Yield the placeholder."""
        yield self.graph, self.tag

    def undo(self, module: fx.GraphModule, tags: Tags) -> None:
        """Take the input out."""
        graphs(module)[self.graph].erase_node(tags.pop((self.graph, self.tag)))


@dataclass(frozen=True)
class AddedLayer:
    """A layer was put where none was.

    Attributes:
        path: where.
    """

    path: str

    def needs(self) -> Iterator[tuple[int, int]]:
        """Yield nothing: the tree is enough."""
        yield from ()

    def undo(self, module: fx.GraphModule, tags: Tags) -> None:
        """Take the layer out."""
        module.delete_submodule(self.path)


Edit = (
    SwappedLayer
    | AddedLayer
    | RemovedLayer
    | SetAttributes
    | ScaledWeight
    | ErasedCall
    | ChangedCall
    | AddedInput
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
            _put(self.module, each, new)
        self.edits.append(SwappedLayer(paths, old))

    def set(self, path: str, *, cls: type[nn.Module] | None = None, **values: Any) -> None:
        """Set attributes of the layer at `path`, and its class."""
        layer = self.module.get_submodule(path)
        before = tuple((name, getattr(layer, name)) for name in values if hasattr(layer, name))
        self.edits.append(SetAttributes(path, before, type(layer)))
        if cls is not None:
            # Same parameters and state-dict keys; only the forward is another.
            layer.__class__ = cls
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
            behind = tuple(names[names.index(name) + 1 :])
            places.setdefault(id(layer), []).append((parent, name, behind))
            follows[id(layer)] = (layer, layer.training == owner.training)
            self.module.delete_submodule(path)
        return {
            key: RemovedLayer(tuple(reversed(found)), *follows[key])
            for key, found in places.items()
        }

    def _call(self, node: fx.Node) -> _Call:
        meta = {key: value for key, value in node.meta.items() if key != "stack_trace"}
        args, kwargs = _map(
            (node.args, node.kwargs),
            lambda leaf: _Ref(self._tag(leaf)) if isinstance(leaf, fx.Node) else leaf,
        )
        return _Call(
            node.op, node.target, tuple(args), dict(kwargs), node.name, meta, node.stack_trace
        )

    def _tag(self, node: fx.Node) -> int:
        if TAG not in node.meta:
            node.meta[TAG] = self._next
            self._next += 1
        tag: int = node.meta[TAG]
        return tag


def _put(module: fx.GraphModule, path: str, layer: nn.Module) -> None:
    """Set the layer at a path, and its class in the places of the nodes that call it."""
    prefix, _, name = path.rpartition(".")
    setattr(module.get_submodule(prefix), name, layer)
    for graph in graphs(module):
        for node in graph.nodes:
            if node.op == "call_module" and node.target == path:
                stack = node.meta.get("nn_module_stack") or {}
                node.meta["nn_module_stack"] = {
                    key: (where, type(layer) if where == path else cls)
                    for key, (where, cls) in stack.items()
                }


def scaled(weight: Tensor, factor: float) -> Tensor:
    """Return a weight times a number: in float64, rounded once."""
    return (weight.detach().double() * factor).to(weight.dtype)


def _paths(module: nn.Module, layer: nn.Module) -> tuple[str, ...]:
    named = module.named_modules(remove_duplicate=False)
    return tuple(path for path, found in named if found is layer)


def _output(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def _visits(user: fx.Node, node: fx.Node) -> tuple[int, ...]:
    """Return which of the nodes in a user's arguments are `node`, by number."""
    found: list[int] = []
    _visit(user, lambda number, each: found.append(number) if each is node else None)
    return tuple(found)


def _visit(user: fx.Node, act: Callable[[int, fx.Node], Any]) -> tuple[Any, Any]:
    """Map the nodes in a user's arguments, with their number; None keeps a node."""
    count = -1

    def step(node: fx.Node) -> Any:
        nonlocal count
        count += 1
        new = act(count, node)
        return node if new is None else new

    mapped: Any = fx.map_arg((user.args, user.kwargs), step)
    args, kwargs = mapped
    return args, kwargs


def _replace_at(user: fx.Node, visits: tuple[int, ...], old: fx.Node, new: fx.Node) -> None:
    args, kwargs = _visit(
        user, lambda number, node: new if number in visits and node is old else None
    )
    user.args, user.kwargs = args, kwargs


def _resolved(recorded: Any, index: int, tags: Tags) -> tuple[Any, Any]:
    args, kwargs = _map(
        recorded, lambda leaf: tags[index, leaf.tag] if isinstance(leaf, _Ref) else leaf
    )
    return args, kwargs


def _leaves(recorded: Any) -> list[Any]:
    leaves: list[Any] = []
    _map(recorded, leaves.append)
    return leaves


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Map the leaves of a node's arguments, which may be any values here."""
    mapped: Any = fx.node.map_aggregate(value, function)
    return mapped
