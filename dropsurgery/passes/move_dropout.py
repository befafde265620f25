"""Dropout only where no BatchNorm sees it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dropsurgery.errors import PassError
from dropsurgery.graph.drops import drops_by_place_or_content, is_drop, is_drop_path, rate
from dropsurgery.graph.inventory import Drop
from dropsurgery.graph.leaves import has_hooks
from dropsurgery.graph.module import Skip, called_module, graphs, module_path
from dropsurgery.graph.weighted import read_weighted
from dropsurgery.layers.drop_connect import DropConnect
from dropsurgery.layers.noise import check_rate
from dropsurgery.passes.base import Change, Pass, Plan
from dropsurgery.passes.conversion import Conversion, Recorder, log_of, write_log


@dataclass(frozen=True)
class _Step:
    """A call to take out, or (`readers`) a value to drop for these readers; names of nodes."""

    graph: int
    node: str
    p: float
    path: str = ""
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class MoveDropoutAfterLastNorm(Pass):
    """Take dropout out from before BatchNorms, and put one behind the last of them.

    The first remedy of Li et al., "Understanding the Disharmony between Dropout and Batch
    Normalization by Variance Shift", 2018, arXiv:1801.05134: no BatchNorm then sees a variance in
    training that eval does not have. Dropout in front of a BatchNorm, whatever lies in between, is
    removed; in front of the network's last layers with weights behind the last BatchNorm one
    `nn.Dropout` is inserted, unless there is a dropout already. The eval output and the state-dict
    keys stay. Drop path, which belongs to its branch, and DropBlock are left alone and listed.
    `ConvertDropout("original")` takes the pass back.

    Args:
        p: rate of the dropout that is inserted, in [0, 1); None for the highest of those removed.

    Raises:
        ArgumentError, ArgumentTypeError: p outside [0, 1).
        PassError: no layer with weights stands behind the last BatchNorm.
    """

    p: float | None = None

    def __post_init__(self) -> None:
        if self.p is not None:
            object.__setattr__(self, "p", check_rate(self.p))

    def plan(self, module: fx.GraphModule) -> Plan:
        """List the dropouts that a BatchNorm sees, and where one goes instead."""
        changes, skipped, steps = [], [], []
        rates: list[float] = []
        for index, graph in enumerate(graphs(module)):
            ahead = _ahead(module, graph)
            for node in graph.nodes:
                layer = called_module(module, node)
                if layer is None or not is_drop(layer) or not ahead[node] or rate(layer) == 0.0:
                    continue
                what = f"{type(layer).__name__} p={rate(layer):.4g} '{node.target}'"
                reason = _stays(layer)
                if reason:
                    skipped.append(Skip(module_path(node), node.name, f"{what}: {reason}"))
                    continue
                rates.append(rate(layer))
                steps.append(_Step(index, node.name, rate(layer), str(node.target)))
                told = f"removed {what}, in front of a BatchNorm"
                changes.append(Change(module_path(node), node.name, told))
        if not rates:
            skipped.append(Skip("", "", "no dropout stands in front of a BatchNorm"))
            return Plan(skipped=tuple(skipped))
        p = max(rates) if self.p is None else self.p
        for index, graph in enumerate(graphs(module)):
            for step in _places(module, graph, index, p):
                steps.append(step)
                reader = next(n for n in graph.nodes if n.name == step.readers[0])
                told = f"inserted Dropout p={p:.4g} in front of {_names(step.readers)}"
                changes.append(Change(module_path(reader), reader.name, told))
        return Plan(tuple(changes), tuple(skipped), tuple(steps))

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Take the calls out, put the new ones in, and write down how to take it back."""
        named = [{node.name: node for node in graph.nodes} for graph in graphs(module)]
        recorder = Recorder(module)
        new: list[Conversion] = []
        loose: dict[int, tuple[nn.Module, int]] = {}
        added: dict[str, str] = {}
        for step in plan.steps:
            node = named[step.graph][step.node]
            if step.readers:
                readers = [named[step.graph][name] for name in step.readers]
                prefix = module_path(readers[0])
                # Both graphs of a network call one layer.
                if prefix not in added or step.graph == 0:
                    added[prefix] = recorder.add_layer(prefix, "dropout", nn.Dropout(step.p))
                path = added[prefix]
                node = recorder.insert(path, node, readers, step.graph)
                drop = _drop(prefix, node.name, path, step, "Dropout")
                what = f"inserted Dropout p={step.p:.4g} '{path}'"
            else:
                layer = module.get_submodule(step.path)
                drop = _drop(module_path(node), node.name, step.path, step, type(layer).__name__)
                loose[id(layer)] = (layer, len(new))
                recorder.erase(node, step.graph)
                what = f"removed {drop.kind} p={step.p:.4g} '{step.path}'"
            new.append(Conversion(drop, what, tuple(recorder.edits)))
            recorder.edits.clear()
        for key, edit in recorder.remove_unused(layer for layer, _ in loose.values()).items():
            number = loose[key][1]
            found = new[number]
            new[number] = Conversion(found.drop, found.what, (*found.edits, edit))
        write_log(module, (*log_of(module), *new))


def _drop(module: str, node: str, path: str, step: _Step, kind: str) -> Drop:
    return Drop(module, node, path, kind, "dropout", step.p, "in training", graph=step.graph)


def _stays(layer: nn.Module) -> str:
    if is_drop_path(layer):
        return "drop path belongs to its branch"
    if drops_by_place_or_content(layer) or isinstance(layer, DropConnect):
        return "it drops no single units"
    return "its forward hooks would be lost" if has_hooks(layer) else ""


def _ahead(module: fx.GraphModule, graph: fx.Graph) -> dict[fx.Node, bool]:
    """Return for every node whether a BatchNorm reads it, whatever lies in between."""
    found: dict[fx.Node, bool] = {}
    for node in reversed(graph.nodes):
        found[node] = any(
            found[user] or isinstance(called_module(module, user), _BatchNorm)
            for user in node.users
        )
    return found


def _places(module: fx.GraphModule, graph: fx.Graph, index: int, p: float) -> list[_Step]:
    """Return where a dropout goes: in front of the last weights behind the last BatchNorm.

    Raises:
        PassError: there are none.
    """
    ahead = _ahead(module, graph)
    behind: set[fx.Node] = set()  # behind a BatchNorm
    dropped: set[fx.Node] = set()  # behind a dropout that no BatchNorm sees
    weights: dict[fx.Node, bool] = {}  # whether weights read it, whatever lies in between
    for node in reversed(graph.nodes):
        weights[node] = any(weights[user] or _is_weighted(module, user) for user in node.users)
    found: dict[fx.Node, list[fx.Node]] = {}
    last = False
    for node in graph.nodes:
        called = called_module(module, node)
        inputs = node.all_input_nodes
        if isinstance(called, _BatchNorm) or any(value in behind for value in inputs):
            behind.add(node)
        active = called is not None and is_drop(called) and rate(called) > 0.0 and not ahead[node]
        if active or any(value in dropped for value in inputs):
            dropped.add(node)
        if not _is_weighted(module, node) or ahead[node] or weights[node]:
            continue
        if inputs[0] in behind:
            last = True
            if inputs[0] not in dropped:
                found.setdefault(inputs[0], []).append(node)
    if not last:
        raise PassError(
            "no layer with weights stands behind the last BatchNorm, so dropout has no place there",
            where=type(module).__name__,
            fix='ds.ConvertDropout("identity") to take it out, or ds.ConvertDropout("uniform")',
        )
    return [
        _Step(index, source.name, p, readers=tuple(node.name for node in readers))
        for source, readers in found.items()
    ]


def _is_weighted(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op not in ("call_module", "call_function"):
        return False
    return read_weighted(module, node, called_module(module, node)) is not None


def _names(readers: tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in readers)
