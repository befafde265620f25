"""Edits of a network that can be taken back.

Every edit knows the nodes that it needs by a tag in their meta, because names and positions change
when a graph is copied or pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropsurgery.graph.clone import clone_structure
from dropsurgery.graph.module import graphs

Tags = dict[tuple[int, int], fx.Node]


@dataclass(frozen=True)
class Ref:
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
            put(module, path, restored)


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
        new: names of those that it did not have.
        cls: its class before.
    """

    path: str
    values: tuple[tuple[str, Any], ...]
    new: tuple[str, ...]
    cls: type[nn.Module]

    def needs(self) -> Iterator[tuple[int, int]]:
        """Yield nothing: the layer is enough."""
        yield from ()

    def undo(self, module: fx.GraphModule, tags: Tags) -> None:
        """Set what was."""
        layer = module.get_submodule(self.path)
        put_class(module, self.path, self.cls)
        for name, value in self.values:
            setattr(layer, name, value)
        for name in self.new:
            delattr(layer, name)


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
class Call:
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
    call: Call
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
    call: Call

    def needs(self) -> Iterator[tuple[int, int]]:
        """Yield the node and what it read."""
        yield self.graph, self.tag
        for leaf in _leaves((self.call.args, self.call.kwargs)):
            if isinstance(leaf, Ref):
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


@dataclass(frozen=True)
class AddedCall:
    """A call was put between a value and its readers.

    Attributes:
        graph: number of its graph.
        tag: its tag.
        source: tag of what it reads.
    """

    graph: int
    tag: int
    source: int

    def needs(self) -> Iterator[tuple[int, int]]:
        """Yield the call and its input."""
        yield self.graph, self.tag
        yield self.graph, self.source

    def undo(self, module: fx.GraphModule, tags: Tags) -> None:
        """Take the call out."""
        node = tags.pop((self.graph, self.tag))
        node.replace_all_uses_with(tags[self.graph, self.source])
        node.graph.erase_node(node)


Edit = (
    AddedCall
    | SwappedLayer
    | AddedLayer
    | RemovedLayer
    | SetAttributes
    | ScaledWeight
    | ErasedCall
    | ChangedCall
    | AddedInput
)


def put(module: fx.GraphModule, path: str, layer: nn.Module) -> None:
    """Set the layer at a path, and its class in the places of the nodes that call it."""
    prefix, _, name = path.rpartition(".")
    setattr(module.get_submodule(prefix), name, layer)
    _restack(module, path, type(layer))


def put_class(module: fx.GraphModule, path: str, cls: type[nn.Module]) -> None:
    """Set the class of the layer at a path, and in the places of the nodes that call it.

    Its parameters and state-dict keys stay; only the forward is another.
    """
    layer = module.get_submodule(path)
    if type(layer) is not cls:
        layer.__class__ = cls
        _restack(module, path, cls)


def _restack(module: fx.GraphModule, path: str, cls: type[nn.Module]) -> None:
    for graph in graphs(module):
        for node in graph.nodes:
            if node.op == "call_module" and node.target == path:
                stack = node.meta.get("nn_module_stack") or {}
                node.meta["nn_module_stack"] = {
                    key: (where, cls if where == path else other)
                    for key, (where, other) in stack.items()
                }


def scaled(weight: Tensor, factor: float) -> Tensor:
    """Return a weight times a number: in float64, rounded once."""
    return (weight.detach().double() * factor).to(weight.dtype)


def visit(user: fx.Node, act: Callable[[int, fx.Node], Any]) -> tuple[Any, Any]:
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
    args, kwargs = visit(
        user, lambda number, node: new if number in visits and node is old else None
    )
    user.args, user.kwargs = args, kwargs


def _resolved(recorded: Any, index: int, tags: Tags) -> tuple[Any, Any]:
    args, kwargs = map_arguments(
        recorded, lambda leaf: tags[index, leaf.tag] if isinstance(leaf, Ref) else leaf
    )
    return args, kwargs


def _leaves(recorded: Any) -> list[Any]:
    leaves: list[Any] = []
    map_arguments(recorded, leaves.append)
    return leaves


def map_arguments(value: Any, function: Callable[[Any], Any]) -> Any:
    """Map the leaves of a node's arguments, which may be any values here."""
    mapped: Any = fx.node.map_aggregate(value, function)
    return mapped
