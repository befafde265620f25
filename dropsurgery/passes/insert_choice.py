"""Where in a network something is inserted: before or after which layers."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from dropsurgery.errors import ArgumentTypeError, PassError
from dropsurgery.graph.module import called_module, graphs, module_path, owner_call
from dropsurgery.graph.ops import Kind, Role, kind_of, roles, writes_in_place


@dataclass(frozen=True)
class Spot:
    """A layer or function call that something can be inserted before or after.

    Attributes:
        node: name of its node; of a call that only the training graph has, "train:" and its name.
        path: dotted path of the layer, or of the module whose forward calls the function.
        kinds: what it is: class names (of bases too, "Conv2d"), or the class that a function
            stands for (`F.relu` is a "ReLU"), and groups: "activation", "conv", "norm", "pool",
            "add".
        index: which of the chosen kind it is in the network, from 0.
    """

    node: str
    path: str
    kinds: frozenset[str]
    index: int


Kinds = str | tuple[str, ...] | None
Where = str | tuple[str, ...] | Callable[[Spot], bool] | None

# What a function or method is called for, as the class that does the same.
_FUNCTIONS = {
    "relu": "ReLU", "relu6": "ReLU6", "gelu": "GELU", "silu": "SiLU", "elu": "ELU",
    "selu": "SELU", "celu": "CELU", "leaky_relu": "LeakyReLU", "hardswish": "Hardswish",
    "hardsigmoid": "Hardsigmoid", "hardtanh": "Hardtanh", "sigmoid": "Sigmoid", "tanh": "Tanh",
    "mish": "Mish", "softplus": "Softplus", "prelu": "PReLU", "linear": "Linear",
    "conv1d": "Conv1d", "conv2d": "Conv2d", "conv3d": "Conv3d",
    "conv_transpose1d": "ConvTranspose1d", "conv_transpose2d": "ConvTranspose2d",
    "conv_transpose3d": "ConvTranspose3d", "layer_norm": "LayerNorm", "group_norm": "GroupNorm",
    "max_pool1d": "MaxPool1d", "max_pool2d": "MaxPool2d", "max_pool3d": "MaxPool3d",
    "avg_pool1d": "AvgPool1d", "avg_pool2d": "AvgPool2d", "avg_pool3d": "AvgPool3d",
    "adaptive_avg_pool1d": "AdaptiveAvgPool1d", "adaptive_avg_pool2d": "AdaptiveAvgPool2d",
    "adaptive_avg_pool3d": "AdaptiveAvgPool3d",
}  # fmt: skip
# Not what "after each activation" means: distributions over an axis, and attention.
_NO_ACTIVATIONS = frozenset(
    {"Softmax", "Softmax2d", "Softmin", "LogSoftmax", "MultiheadAttention", "GLU"}
)
_ACTIVATIONS = frozenset(
    name
    for name, value in vars(nn.modules.activation).items()
    if isinstance(value, type) and issubclass(value, nn.Module) and value is not nn.Module
).difference(_NO_ACTIVATIONS)
_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("conv", ("Conv",)),
    (
        "norm",
        ("BatchNorm", "SyncBatchNorm", "FrozenBatchNorm", "LayerNorm", "GroupNorm",
         "InstanceNorm", "RMSNorm"),
    ),
    ("pool", ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")),
)  # fmt: skip
# Layers that return several values, of which the first is what they compute.
_SEVERAL = (nn.RNNBase, nn.MultiheadAttention)


def kinds_of(module: fx.GraphModule, node: fx.Node) -> frozenset[str]:
    """Return what a node is, by class name and group; see `Spot`. Empty for what is no layer."""
    if kind_of(module, node) is Kind.ADD:
        return frozenset({"add"})
    called = called_module(module, node)
    if called is not None:
        bases = type(called).__mro__[: type(called).__mro__.index(nn.Module)]
        names = {base.__name__ for base in bases if not base.__name__.startswith("_")}
        timms = any(base.__module__.startswith("timm.layers.activations") for base in bases)
        # timm's BatchNormAct2d and its kin end in an activation.
        act = getattr(called, "act", None)
        fused = isinstance(act, nn.Module) and not isinstance(act, nn.Identity)
        activates = timms or (fused and any("NormAct" in name for name in names))
    elif node.op in ("call_function", "call_method"):
        name = getattr(node.target, "__name__", str(node.target)).rstrip("_")
        names = {_FUNCTIONS[name]} if name in _FUNCTIONS else set()
        activates = False
    else:
        return frozenset()
    if activates or names & _ACTIVATIONS:
        names.add("activation")
    names |= {group for group, starts in _GROUPS if any(name.startswith(starts) for name in names)}
    return frozenset(names)


def check_kinds(kinds: object, name: str) -> Kinds:
    """Return a choice of kinds, lists as tuples, or raise where it is none."""
    if isinstance(kinds, list):
        kinds = tuple(kinds)
    if kinds is None or isinstance(kinds, str):
        return kinds
    if isinstance(kinds, tuple) and kinds and all(isinstance(kind, str) for kind in kinds):
        return kinds
    raise ArgumentTypeError(
        f"{name} names kinds of layers, got {kinds!r}",
        fix="'Linear', 'activation', 'conv', or a tuple of such",
    )


def matches(where: Where, spot: Spot) -> bool:
    """Say whether `where` chooses a spot: by its path or a pattern for it, its node's name, …"""
    if where is None:
        return True
    if callable(where):
        return bool(where(spot))
    patterns = (where,) if isinstance(where, str) else where
    return any(p == spot.node or fnmatch.fnmatchcase(spot.path, p) for p in patterns)


@dataclass(frozen=True)
class Found:
    """A spot with its nodes: one for each graph that has it, by number of the graph."""

    spot: Spot
    nodes: tuple[tuple[int, fx.Node], ...]

    @property
    def first(self) -> fx.Node:
        """Its node in the first graph that has it."""
        return self.nodes[0][1]


def find_spots(module: fx.GraphModule, kinds: Kinds) -> list[Found]:
    """Return every call of these kinds (of any, without), in order; the same call once."""
    wanted = {kinds} if isinstance(kinds, str) else set(kinds or ())
    nodes: dict[tuple[object, ...], list[tuple[int, fx.Node]]] = {}
    for number, graph in enumerate(graphs(module)):
        role = roles(module, graph)
        turns: dict[tuple[object, ...], int] = {}
        for node in graph.nodes:
            key = (owner_call(node), node.op, node.target)
            turns[key] = turns.get(key, 0) + 1
            own = kinds_of(module, node)
            if (wanted & own if wanted else own) and role[node] is Role.DATA:
                nodes.setdefault((*key, turns[key]), []).append((number, node))
    found = []
    for index, group in enumerate(nodes.values()):
        number, node = group[0]
        name = f"train:{node.name}" if number else node.name
        path = str(node.target) if node.op == "call_module" else module_path(node)
        spot = Spot(name, path, kinds_of(module, node), index)
        found.append(Found(spot, tuple(group)))
    return found


def choose(module: fx.GraphModule, kinds: Kinds, where: Where, title: str) -> list[Found]:
    """Return the spots of these kinds that `where` chooses.

    Raises:
        PassError: there are none.
    """
    found = find_spots(module, kinds)
    if not found:
        every = sorted({kind for item in find_spots(module, None) for kind in item.spot.kinds})
        raise PassError(
            f"{title} finds no {kinds!r} in the network",
            where=f"it has {', '.join(every)}" if every else "it has no layers at all",
            fix="a class name or a group of these",
        )
    chosen = [item for item in found if matches(where, item.spot)]
    if not chosen:
        known = [item.spot.path or item.spot.node for item in found]
        raise PassError(
            f"where={where!r} matches none of the {len(found)} places",
            where=", ".join(known[:8]) + (", …" if len(known) > 8 else ""),
            fix="a module path or pattern, a node's name, or a callable that takes a Spot",
        )
    return chosen


def output_of(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the node that holds what a layer computes: itself, or the first of its values."""
    if not isinstance(called_module(module, node), _SEVERAL):
        return node
    first = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
    return first[0] if len(first) == 1 else None


def parted_from(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return a value that must see what is written into `node`'s output, and would not any more.

    A node that writes into its operand, or returns a view of it, shares its memory. What writes
    into the output then changes the operand too, which others may read afterwards. With a drop
    between, in training, it would change a copy.

    Args:
        module: the network.
        node: the node before or after which the drop comes.
    """
    order = {other: position for position, other in enumerate(node.graph.nodes)}
    for source in _sources(module, node):
        if not any(order[user] > order[node] for user in source.users):
            continue
        for writer in list(order)[order[node] :]:
            if writes_in_place(module, writer) and source in _sources(module, writer):
                return source
    return None


def _sources(module: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """Yield the values whose memory a node's output may be."""
    while _may_alias(module, node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        yield node


def _may_alias(module: fx.GraphModule, node: fx.Node) -> bool:
    views = (Kind.ALIAS, Kind.SLICE, Kind.ITEM, Kind.SPLIT, Kind.DROP)
    return writes_in_place(module, node) or kind_of(module, node) in views
