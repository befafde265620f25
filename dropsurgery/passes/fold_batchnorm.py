"""BatchNorm into the convolution or linear layer before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

from dropsurgery.errors import PassError
from dropsurgery.graph.affine import (
    Affine,
    Norm,
    Refused,
    identity_input,
    is_norm,
    norm_function,
    read_norm,
)
from dropsurgery.graph.carriers import check_alone
from dropsurgery.graph.channels import Shapes, axis_before_view, channel_axis, moves_axes
from dropsurgery.graph.module import Skip, describe, fresh_path, module_path
from dropsurgery.graph.rounding import HALF
from dropsurgery.graph.trace import keep_eval
from dropsurgery.graph.two_mode import TwoModeGraphModule
from dropsurgery.graph.uses import Uses, value_readers
from dropsurgery.graph.weighted import Weighted, loses_precision, read_weighted
from dropsurgery.passes.base import Change, Pass, Plan
from dropsurgery.passes.weight_edit import WeightEditor


@dataclass(frozen=True)
class Site:
    """One call of a layer and what it takes in, as node names.

    Attributes:
        producer: the convolution or linear layer.
        norms: the BatchNorms behind it, in order.
        identities: nodes between them that return their input as it is.
    """

    producer: str
    norms: tuple[str, ...]
    identities: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """One set of folded weights.

    Attributes:
        sites: the calls that use it; more than one where a layer and its BatchNorm are shared.
        copy_to: path of a new module for it, where the layer's own weights are needed elsewhere.
    """

    sites: tuple[Site, ...]
    copy_to: str | None = None


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold each BatchNorm in eval mode into the layer that produces its input.

    With s = weight/√(var + eps) and t = bias - mean·s, the layer's W and b become s·W (over the
    output channels) and s·b + t. The arithmetic is float64 and is rounded once, also where several
    BatchNorms follow each other.

    Layers: convolutions and transposed convolutions over 1, 2 and 3 axes with any groups, linear
    layers; as modules or as functions of parameters. BatchNorms: those of torch, `F.batch_norm`,
    SyncBatchNorm, torchvision's FrozenBatchNorm2d, timm's BatchNormAct2d and its kin, whose drop
    layer and activation stay as `<path>.drop` and `<path>.act`. A drop layer in eval mode between
    the two goes with the BatchNorm.

    Which axis carries the channels is proved (`dropsurgery.graph.channels`); for a linear layer
    that mostly takes example inputs: `ds.apply(model, ds.FoldBatchNorm(), example_inputs=(x,))`.
    A convolution is taken to be batched, unless shapes or the graph say that it is not.

    The folded layers get new parameters, which keep dtype, device, strides and `requires_grad`.
    The BatchNorm's state-dict entries go; a layer without a bias gains one. A layer that is called
    at several places is folded once if all of them have the same BatchNorm behind them, else each
    place that can be folded gets a copy (`<path>_folded`) and the layer itself stays for the rest.
    A parameter that is tied between modules becomes the folded layer's own, the others keep theirs.

    Left alone, with the reason: BatchNorms in training mode or without running statistics, with
    statistics that are not finite, whose folded weights cannot be held in the layer's dtype, whose
    input other nodes read too or comes from something else, or whose channel axis is not proved.

    The result is an inference graph. `train()` on it still reaches what is left, drop layers and
    unfolded BatchNorms, but a folded layer has no statistics any more and computes the same in both
    modes. A network whose forward differs between the modes keeps its eval graph only.

    Args:
        nodes: names of the BatchNorm nodes to fold, as a saved surgery lists them: exactly these,
            on the word of whoever proved then that it is exact (the weights may not be there yet).
            None folds each one that can be proved.

    Raises:
        PassError: `nodes` names a node that cannot be folded.
    """

    keeps_state_dict_keys: ClassVar[bool] = False
    nodes: tuple[str, ...] | None = None

    def plan(self, module: fx.GraphModule) -> Plan:
        """Return which BatchNorms can be folded, and why the others cannot."""
        return _Planner(module, self.nodes).plan()

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Fold, then take out of the module tree what nothing uses any more."""
        if not plan.steps:
            return
        surgeon = _Surgeon(module)
        with torch.no_grad():
            for step in plan.steps:
                surgeon.fold(step)
        if isinstance(module, TwoModeGraphModule):
            keep_eval(module)
        surgeon.clear()

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return the nodes that were folded: other weights or inputs would prove others."""
        sites = [site for step in plan.steps for site in step.sites]
        return {"pass": self.name, "nodes": [name for site in sites for name in site.norms]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FoldBatchNorm:
        """Build the pass again from what `to_json` wrote."""
        return cls(nodes=tuple(data["nodes"]))


@dataclass
class _Chain:
    """A layer and the BatchNorms behind it, while the plan is made."""

    producer: fx.Node
    weighted: Weighted
    axis: int | None
    affine: Affine | None = None
    norms: list[tuple[fx.Node, Norm]] = field(default_factory=list)
    identities: list[fx.Node] = field(default_factory=list)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two calls of one layer exactly where the folded weights are the same."""
        norms = [
            (norm.eps, *(id(t) for t in (norm.mean, norm.var, norm.weight, norm.bias)))
            for _, norm in self.norms
        ]
        return (id(self.weighted.module or self.producer), *norms)

    @property
    def owner(self) -> str:
        """The path of the module that has the weight."""
        weight = self.weighted.operands[0]
        return str(
            self.producer.target if weight is None else str(weight.target).rpartition(".")[0]
        )

    def site(self) -> Site:
        """Return the chain as plain data."""
        return Site(
            self.producer.name,
            tuple(node.name for node, _ in self.norms),
            tuple(node.name for node in self.identities),
        )


class _Planner:
    def __init__(self, module: fx.GraphModule, nodes: tuple[str, ...] | None) -> None:
        self.module = module
        self.nodes = nodes
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.uses = Uses(module, module.graph, self.modules)
        self.shapes = Shapes(module, module.graph, self.modules)
        self.chains: list[_Chain] = []
        self.open: dict[fx.Node, _Chain] = {}  # by the node whose value the chain computes
        self.paths: set[str] = set()

    def plan(self) -> Plan:
        skipped = self.find_chains()
        groups: dict[tuple[object, ...], list[_Chain]] = {}
        for chain in self.chains:
            groups.setdefault(chain.key, []).append(chain)
        steps: list[Fold] = []
        changes: list[Change] = []
        for chains in groups.values():
            step = Fold(tuple(chain.site() for chain in chains), self.copy_path(chains))
            steps.append(step)
            changes += [change for chain in chains for change in self.changes(chain, step)]
        if steps and isinstance(self.module, TwoModeGraphModule):
            changes.append(
                Change("", "", "the training graph was dropped: this is an inference graph")
            )
        # A copy is made of the layer as it was, so before the layer itself is folded.
        steps.sort(key=lambda step: step.copy_to is None)
        return Plan(tuple(changes), tuple(skipped), tuple(steps))

    def find_chains(self) -> list[Skip]:
        """Fill `chains`, and return what is left alone."""
        skipped: list[Skip] = []
        norms = {n.name: n for n in self.module.graph.nodes if is_norm(n, self.called(n))}
        missing = sorted(set(self.nodes or ()) - set(norms))
        if missing:
            raise PassError(
                f"FoldBatchNorm is to fold {', '.join(missing)}, and there is no such BatchNorm",
                fix="the network that the surgery was saved from",
            )
        for name in norms if self.nodes is None else (n for n in norms if n in self.nodes):
            node = norms[name]
            try:
                self.add(node, self.called(node))
            except Refused as refused:
                reason = f"{self.label(node)}: {refused}"
                if self.nodes is not None:
                    raise PassError(
                        f"a node that FoldBatchNorm is to fold cannot be: {reason}",
                        where=describe(node),
                        fix="the network that the surgery was saved from, in eval mode",
                    ) from None
                skipped.append(Skip(module_path(node), node.name, reason))
        return skipped

    def called(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def label(self, node: fx.Node) -> str:
        """Name a node for people: what it calls, and the path of that or its own name."""
        called = self.called(node)
        if called is not None:
            return f"{type(called).__name__} '{node.target}'"
        kind = getattr(node.target, "__name__", str(node.target))
        return f"{kind if node.op.startswith('call') else node.op} '{node.name}'"

    def add(self, node: fx.Node, called: nn.Module | None) -> None:
        """Append a BatchNorm to the chain that computes its input; raises Refused."""
        if self.module.training and isinstance(self.module, TwoModeGraphModule):
            raise Refused(
                "the network is in training mode, where its forward is another: "
                "call .eval() on it first"
            )
        norm = read_norm(self.module, node, called)
        for tensor in norm.tensors:
            for reader in self.uses.readers(tensor):
                if norm_function(reader, self.called(reader)) is None:
                    raise Refused(f"'{reader.name}' reads its statistics or parameters, too")
        source, axis, between = self.source(norm.data)
        chain = self.open.get(source) or self.start(source)
        others = [user for user in value_readers(source) if user not in (node, *between)]
        if others:
            names = ", ".join(sorted(user.name for user in others))
            raise Refused(f"its input '{source.name}' is read by {names}, too")
        self.check_axis(chain, norm, source, axis)
        self.check_match(chain, norm)
        after = norm.affine()
        affine = after if chain.affine is None else chain.affine.then(after)
        reason = loses_precision(chain.weighted, affine) if self.nodes is None else None
        if reason is not None:
            raise Refused(reason)
        if chain.affine is None:
            self.chains.append(chain)
        chain.affine = affine
        chain.norms.append((node, norm))
        chain.identities += [n for n in between if identity_input(n, self.called(n)) is not None]
        self.open.pop(source, None)
        if not norm.tail:
            self.open[node] = chain

    def source(self, data: fx.Node) -> tuple[fx.Node, int | None, list[fx.Node]]:
        """Walk back from a BatchNorm over nodes that return their input's values as they are.

        Returns:
            Where they come from, the axis of it that the BatchNorm normalises (None where that is
            not known), and the nodes between.
        """
        between: list[fx.Node] = []
        axis: int | None = 1
        while True:
            before = identity_input(data, self.called(data))
            if before is None:
                view = axis_before_view(self.shapes, data, 1 if axis is None else axis)
                if view is None:
                    return data, axis, between
                before, axis = view[0], None if axis is None else view[1]
            readers = value_readers(data)
            if len(readers) > 1:
                names = ", ".join(sorted(user.name for user in readers))
                raise Refused(f"its input '{data.name}' has several readers: {names}")
            between.append(data)
            data = before

    def start(self, node: fx.Node) -> _Chain:
        """Begin a chain at a convolution or linear layer."""
        weighted = read_weighted(self.module, node, self.called(node))
        if weighted is None:
            called = self.called(node)
            mode = " in training mode" if called is not None and called.training else ""
            raise Refused(
                f"its input comes from {self.label(node)}{mode}, into which nothing can be folded"
            )
        check_alone(self.uses, self.modules, node, weighted)
        return _Chain(node, weighted, channel_axis(self.shapes, node, weighted))

    def check_axis(self, chain: _Chain, norm: Norm, source: fx.Node, axis: int | None) -> None:
        """Raise Refused unless what the BatchNorm normalises are the layer's channels.

        Args:
            chain: the layer, with the BatchNorms that it has taken in.
            norm: the BatchNorm.
            source: where its input comes from: the layer, or the last of those BatchNorms.
            axis: the axis of that which it normalises.
        """
        label = chain.weighted.label
        channels = chain.axis if source is chain.producer else 1
        if None in (axis, channels):
            if self.nodes is not None:
                return
            unknown = f"the rank of the output of {label} is not known"
            if channels is not None:
                unknown = f"the axes of the output of {label} are merged, or moved by unknown ranks"
            raise Refused(
                f"{unknown}, and so not which axis is normalised: trace with example inputs, for "
                "example ds.apply(model, ds.FoldBatchNorm(), example_inputs=(x,))"
            )
        if axis != channels:
            raise Refused(
                f"it normalises axis {axis} of the output of {label}, and the channels are on axis "
                f"{channels}"
            )
        rank = self.shapes.rank(norm.data)
        if rank is None and chain.weighted.spatial is not None:
            rank = chain.weighted.spatial + 2
        if norm.ranks is not None and rank is not None and rank not in norm.ranks:
            raise Refused(f"it does not take the output of {label}, which has {rank} axes")

    def check_match(self, chain: _Chain, norm: Norm) -> None:
        """Raise Refused unless layer and BatchNorm have the same channels, dtype and device."""
        weighted = chain.weighted
        features = [tensor.numel() for tensor in norm.tensors]
        if any(count != weighted.channels for count in features):
            raise Refused(
                f"it has {features[0]} features, {weighted.label} {weighted.channels} channels"
            )
        own, other = weighted.weight.dtype, {tensor.dtype for tensor in norm.tensors}
        mixed = own in HALF and other == {torch.float32}
        if other != {own} and (norm.promotes or not mixed):
            names = ", ".join(sorted(str(dtype) for dtype in other))
            raise Refused(f"{weighted.label} is {own} and the statistics are {names}")
        if {t.device for t in norm.tensors} != {weighted.weight.device}:
            raise Refused(f"it is not on the device of {weighted.label}")

    def copy_path(self, chains: list[_Chain]) -> str | None:
        """Return the path of a copy for a group of calls, or None where the layer itself is theirs.

        The layer is theirs if every call of it is folded, and they are the first group.
        """
        layer = chains[0].weighted.module
        if layer is None:
            return None
        folded = [chain for chain in self.chains if chain.weighted.module is layer]
        first = folded[0].key == chains[0].key
        if first and len(folded) == len(self.uses.calls(layer)) and not self.uses.is_within(layer):
            return None
        prefix, _, name = str(chains[0].producer.target).rpartition(".")
        owner = self.modules[prefix]
        path = fresh_path(owner, prefix, f"{name}_folded", self.paths)
        self.paths.add(path)
        return path

    def changes(self, chain: _Chain, step: Fold) -> list[Change]:
        """Say what was folded, one entry a BatchNorm."""
        notes = ""
        if step.copy_to is not None:
            notes += f"; this call has a copy of its own, '{step.copy_to}'"
        else:
            holders = self.uses.holders(chain.weighted.weight)
            owner = self.modules[chain.owner]
            tied = [path for path in holders if self.modules[path] is not owner]
            if tied:
                notes += f"; its weight is no longer tied to that of {', '.join(map(repr, tied))}"
        found: list[Change] = []
        for node, norm in chain.norms:
            what = f"{norm.label} folded into {chain.weighted.label}{notes}"
            if norm.tail:
                stays = "stay" if len(norm.tail) > 1 else "stays"
                what += f"; its {' and '.join(norm.tail)} {stays}"
            found.append(Change(module_path(node), node.name, what))
        for node in chain.identities:
            what = f"{self.label(node)} removed: in eval mode it is the identity"
            found.append(Change(module_path(node), node.name, what))
        return found


class _Surgeon(WeightEditor):
    """Carries folds out on a module."""

    def fold(self, step: Fold) -> None:
        """Put the BatchNorms of a step into the layer, and take them out of the graph.

        The layer's output and the BatchNorm's are both new tensors, and nobody but the BatchNorm
        read the values of the first. So the first can stand in for the second: what wrote to the
        one in place, or shared memory with it, does so with the other, and nothing else can tell.
        """
        for site in step.sites:
            for name in site.identities:
                self.bypass(self.nodes[name])
        first = step.sites[0]
        producer = self.nodes[first.producer]
        weighted = read_weighted(self.module, producer, self.called(producer))
        assert weighted is not None
        affines = [self.norm(name).affine() for name in first.norms]
        affine = affines[0]
        for after in affines[1:]:
            affine = affine.then(after)
        weight, bias = weighted.absorb(affine)
        self.put_weights(producer, weighted, weight, bias, step.copy_to or "")
        for site in step.sites:
            for name in site.norms:
                self.remove_norm(name)
            if step.copy_to is not None:
                self.retarget(self.nodes[site.producer], step.copy_to)

    def norm(self, name: str) -> Norm:
        node = self.nodes[name]
        return read_norm(self.module, node, self.called(node))

    def remove_norm(self, name: str) -> None:
        """Take a BatchNorm out; what it runs on the normalised value stays."""
        norm = self.norm(name)
        # A BatchNorm's output is contiguous, and `view` behind it may rely on that.
        dense = moves_axes(norm.data)
        self.take_map_out(self.nodes[name], norm.data, norm.tail, dense=dense)
