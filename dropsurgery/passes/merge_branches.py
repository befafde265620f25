"""Linear branches and chains into one convolution or linear layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from dropsurgery.errors import PassError
from dropsurgery.graph.affine import Refused
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.linear import Linear, between
from dropsurgery.graph.linear_regions import LinearRegions, Region
from dropsurgery.graph.module import Skip, describe, fresh_path, module_path
from dropsurgery.graph.pieces import Gain, Layer, Sum, operands
from dropsurgery.graph.rounding import HALF, round_rows
from dropsurgery.graph.stencil import Kernel, Stencil
from dropsurgery.graph.trace import keep_eval
from dropsurgery.graph.two_mode import TwoModeGraphModule
from dropsurgery.graph.uses import Uses
from dropsurgery.passes.base import Change, Pass, Plan
from dropsurgery.passes.edit import Editor


@dataclass(frozen=True)
class Merge:
    """One new layer.

    Attributes:
        sites: what it takes the place of, as (source, node): it reads the value of `source` and
            gives that of `node`. More than one where the layers between are called several times.
        path: the path of the new layer.
    """

    sites: tuple[tuple[str, str], ...]
    path: str


@dataclass(frozen=True)
class MergeLinearBranches(Pass):
    """Make one convolution of linear branches that meet in a sum, and of linear chains.

    A convolution, average pooling, BatchNorm in eval mode, gain or identity is a sum of shifted
    copies of its input with a matrix W[i] for each shift, and so is a sum of those, and one of them
    behind another: W = W₁ + W₂, or W[q] = Σ W₂[j]·W₁[i] over s₁·j + i = q. What reads one value and
    is built of nothing else becomes one layer: the branches of RepVGG, MobileOne, ACNet and Diverse
    Branch Block, x + g·(mixer(x) - norm(x)) of RepMixer, W·x + B·(A·x) of a low-rank adapter.
    The arithmetic is float64 and is rounded once, to the dtype of the layers.

    Exact or left alone, with the reason:

    - branches of a sum: the same input, stride, padding mode and channels, and outputs of one size
      for every input (kernel, padding and dilation together tell); average pooling with padding
      only where the padding counts (`count_include_pad`), and not with `ceil_mode` and a stride;
    - a layer behind another: it does not pad, or what it pads is pointwise and has no bias (nor a
      BatchNorm) to be cut off at the border; with padding by reflection, replication or
      wrapping, pointwise and without a stride;
    - nothing else reads what is between, and nothing writes into it or into the input;
    - BatchNorms in eval mode, with statistics that are finite; layers of one dtype and device;
      no hooks, no parametrizations; the merged values can be held in that dtype;
    - layers that are called elsewhere too stay, unless every call of theirs is part of an equal
      merge, which then share one layer; so do layers whose weights are tied to others.

    Where groups or dilations differ, the merged layer has the common ones, with zeros. A merge that
    would make more weights, or more multiplications for each output, than the layers it replaces
    have together is not made (1x3 + 3x1, a bottleneck, 1x1 behind a depthwise one), and told.

    The merged layer is `merged` in the module whose forward held the sum. The result is an
    inference graph; a network whose forward differs between the modes keeps its eval graph only.

    Args:
        allow_growth: merge where that makes more weights or multiplications, too.
        merges: (source, node) pairs of node names to merge, as a saved surgery lists them: exactly
            these. None merges what can be.

    Raises:
        PassError: `merges` names a pair that cannot be merged.
    """

    keeps_state_dict_keys: ClassVar[bool] = False
    allow_growth: bool = False
    merges: tuple[tuple[str, str], ...] | None = None

    def plan(self, module: fx.GraphModule) -> Plan:
        """Return what can be merged, and why other sums, and chains that would grow, are not."""
        return _Planner(module, self).plan()

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Merge, then take out of the module tree what nothing uses any more."""
        if not plan.steps:
            return
        surgeon = _Surgeon(module)
        with torch.no_grad():
            for step in plan.steps:
                surgeon.merge(step)
        if isinstance(module, TwoModeGraphModule):
            keep_eval(module)
        surgeon.clear()

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return the pairs that were merged: other weights would prove others."""
        pairs = [list(site) for step in plan.steps for site in step.sites]
        return {"pass": self.name, "allow_growth": self.allow_growth, "merges": pairs}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MergeLinearBranches:
        """Build the pass again from what `to_json` wrote."""
        pairs = tuple((str(source), str(node)) for source, node in data["merges"])
        return cls(bool(data["allow_growth"]), pairs)


class _Planner:
    def __init__(self, module: fx.GraphModule, settings: MergeLinearBranches) -> None:
        self.module = module
        self.settings = settings
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.uses = Uses(module, module.graph, self.modules)
        self.regions = LinearRegions(module, self.modules)
        self.linear = self.regions.linear
        self.nodes = {node.name: node for node in module.graph.nodes}

    def plan(self) -> Plan:
        if self.settings.merges is None:
            chosen, skipped = self.choose()
        else:
            chosen, skipped = self.given(self.settings.merges), {}
        groups: dict[int, list[tuple[fx.Node, fx.Node]]] = {}
        interned: dict[Any, int] = {}
        for node, source in chosen.items():
            groups.setdefault(self.signature(node, source, interned), []).append((source, node))
        steps: list[Merge] = []
        changes: list[Change] = []
        for sites in groups.values():
            reason = self.shared(sites) if self.settings.merges is None else None
            if reason is not None:
                skipped.update(dict.fromkeys((node for _, node in sites), reason))
                continue
            path = self.path(sites[0][1], {step.path for step in steps})
            steps.append(Merge(tuple((s.name, n.name) for s, n in sites), path))
            changes += [self.change(source, node, path) for source, node in sites]
        if steps and isinstance(self.module, TwoModeGraphModule):
            changes.append(
                Change("", "", "the training graph was dropped: this is an inference graph")
            )
        skips = [Skip(module_path(node), node.name, reason) for node, reason in skipped.items()]
        return Plan(tuple(changes), tuple(skips), tuple(steps))

    def choose(self) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, str]]:
        """Return (node → source) of what is to be merged, and why other sums are not."""
        if self.module.training and isinstance(self.module, TwoModeGraphModule):
            return {}, {}
        chosen: dict[fx.Node, fx.Node] = {}
        taken: set[fx.Node] = set()
        skipped: dict[fx.Node, str] = {}
        for node in reversed(self.module.graph.nodes):
            if node in taken:
                continue
            regions = self.regions.found[node]
            # The largest first; a reason, which has no size, last.
            order = sorted(regions, key=lambda s: -len(getattr(regions[s], "nodes", ())))
            reasons = []
            for source in order:
                region = regions[source]
                reason = region if isinstance(region, str) else self.refusal(node, source, region)
                if reason is None:
                    assert isinstance(region, Region)
                    chosen[node] = source
                    taken |= region.nodes
                    break
                reasons.append(reason)
            else:
                told = [reason for reason in reasons if reason]
                if isinstance(self.linear.piece(node), Layer):
                    told = [why for source in order if (why := self.growth(regions[source]))]
                if told and isinstance(self.linear.piece(node), Sum | Layer):
                    skipped[node] = told[0]
        skips = {node: reason for node, reason in skipped.items() if node not in taken}
        return dict(reversed(chosen.items())), dict(reversed(skips.items()))

    def refusal(self, node: fx.Node, source: fx.Node, region: Region) -> str | None:
        """Return why a region is not merged, "" where there is nothing to merge; None if it is."""
        if not self.is_several(region):
            return ""
        try:
            region.form.even()
        except Refused as refused:
            return str(refused)
        return (
            self.growth(region)
            or self.regions.not_closed(node, source, region)
            or self.not_one_kind(node, source, region)
        )

    def is_several(self, region: Region) -> bool:
        """Say whether there is something to merge: a layer with weights, and a sum or another."""
        layers = [self.linear.piece(layer) for layer, _, _ in region.costs]
        weighted = any(isinstance(p, Layer) and p.weighted is not None for p in layers)
        return weighted and (bool(region.sums) or len(layers) > 1)

    def growth(self, region: Region | str) -> str | None:
        """Return what a merge would make more of, where that is not wanted; or None."""
        if isinstance(region, str) or not self.is_several(region) or self.settings.allow_growth:
            return None
        try:
            form = region.form.even()
        except Refused:
            return None
        weights = sum(count for _, count, _ in region.costs)
        work = sum(count * form.stride // stride for _, count, stride in region.costs)
        if form.numel <= min(weights, work):
            return None
        before = "weights" if form.numel > weights else "multiplications for each output"
        count = min(weights, work)
        return f"one layer of shape {_size(form)} would grow {count} {before} to {form.numel}"

    def not_one_kind(self, node: fx.Node, source: fx.Node, region: Region) -> str | None:
        """Return why the values of a region cannot be one layer's, or None."""
        pieces = [self.linear.piece(value) for value in region.nodes]
        weighted = [p.weighted for p in pieces if isinstance(p, Layer) and p.weighted is not None]
        dtype, device = weighted[0].weight.dtype, weighted[0].weight.device
        if any((w.weight.dtype, w.weight.device) != (dtype, device) for w in weighted):
            return "its layers have different dtypes or devices"
        half = dtype in HALF
        for piece in pieces:
            tensors = piece.tensors if isinstance(piece, Gain) else ()
            dtypes = {tensor.dtype for tensor in tensors if tensor.ndim} - {dtype}
            mixes = isinstance(piece, Gain) and piece.norm is not None and not piece.norm.promotes
            if dtypes and not (half and mixes and dtypes == {torch.float32}):
                names = ", ".join(sorted(map(str, dtypes)))
                return f"its layers are {dtype}, and a gain or BatchNorm of it {names}"
            if any(t.device != device for t in tensors if t.ndim):
                return "a gain or BatchNorm is not on the device of its layers"
        if self.settings.merges is not None:
            return None
        with torch.no_grad():
            return self.loses_precision(node, source, dtype)

    def loses_precision(self, node: fx.Node, source: fx.Node, dtype: torch.dtype) -> str | None:
        """Return why the merged parameters cannot be held in a dtype, or None."""
        info = torch.finfo(dtype)
        most = self.linear.bounds(node, source)
        # Far from both ends of the dtype's range nothing needs to be computed.
        if max(most) < info.max and most[0] > info.tiny * 2**30:
            return None
        kernel = self.linear.kernel(node, source)
        weight = kernel.placed(kernel.form)
        peaks = torch.stack((weight.abs().max(), kernel.bias.abs().max()))
        if not bool(peaks.to(dtype).isfinite().all()):
            return f"the merged weights are not finite in {dtype}"
        if 0.0 < float(peaks[0]) < info.tiny:
            return f"the merged weights are too small for {dtype} (largest {float(peaks[0]):.2g})"
        return None

    def given(self, pairs: tuple[tuple[str, str], ...]) -> dict[fx.Node, fx.Node]:
        """Return (node → source) of what a saved surgery lists."""
        chosen: dict[fx.Node, fx.Node] = {}
        for source_name, name in pairs:
            node, source = self.nodes.get(name), self.nodes.get(source_name)
            reason: str | None = "there is no such pair of nodes"
            if node is not None and source is not None:
                region = self.regions.found[node].get(source, "it is not linear in it")
                reason = region if isinstance(region, str) else self.refusal(node, source, region)
                if reason is None:
                    chosen[node] = source
                    continue
            raise PassError(
                f"MergeLinearBranches is to merge '{name}' from '{source_name}': {reason}",
                where="" if node is None else describe(node),
                fix="the network that the surgery was saved from, in eval mode",
            )
        return chosen

    def signature(self, node: fx.Node, source: fx.Node, interned: dict[Any, int]) -> int:
        """Return a number that is equal for nodes that are computed equally, by the same layers."""
        found = {source: -1}

        def key(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return repr(value)
            if value not in found:
                called = self.linear.called(value)
                target = id(called) if called is not None else str(value.target)
                parts = (value.op, target, *map(key, value.args))
                named = tuple((name, key(item)) for name, item in value.kwargs.items())
                found[value] = interned.setdefault((parts, named), len(interned))
            return found[value]

        return int(key(node))

    def shared(self, sites: list[tuple[fx.Node, fx.Node]]) -> str | None:
        """Return which layer of equal merges is used elsewhere, too, or None."""
        within: set[fx.Node] = set()
        for source, node in sites:
            region = self.regions.found[node][source]
            assert isinstance(region, Region)
            within |= region.nodes
        layers = {m for node in within if (m := self.linear.called(node)) is not None}
        for value in within:
            piece = self.linear.piece(value)
            if not isinstance(piece, Layer) or piece.weighted is None:
                continue
            label, called = piece.weighted.label, self.linear.called(value)
            calls = [] if called is None else self.uses.calls(called)
            others = [call.name for call in calls if call not in within]
            for tensor in piece.weighted.tensors:
                others += [r.name for r in self.uses.readers(tensor) if r not in within]
                holders = (self.modules[path] for path in self.uses.holders(tensor))
                others += [
                    type(holder).__name__
                    for holder in holders
                    if holder not in layers and self.uses.is_run(holder)
                ]
            if others or (called is not None and self.uses.is_within(called)):
                names = ", ".join(dict.fromkeys(others)) or "a module that is kept whole"
                return f"{label} or its weight is also used by {names}, and would have to stay"
        return None

    def path(self, node: fx.Node, taken: set[str]) -> str:
        """Return a free path for the merged layer, in the module whose forward holds a node."""
        prefix = module_path(self.linear.behind_same(node))
        while prefix not in self.modules:
            prefix = prefix.rpartition(".")[0]
        return fresh_path(self.modules[prefix], prefix, "merged", taken)

    def change(self, source: fx.Node, node: fx.Node, path: str) -> Change:
        """Say what was merged."""
        region = self.regions.found[node][source]
        assert isinstance(region, Region)
        kinds: Counter[str] = Counter()
        for value in region.nodes:
            piece = self.linear.piece(value)
            if isinstance(piece, Layer):
                kinds[_noun(piece)] += 1
            elif isinstance(piece, Gain):
                kinds["gain" if piece.norm is None else "BatchNorm"] += 1
        form = region.form.even()
        parts = [f"{count} {name}{'s' * (count > 1)}" for name, count in sorted(kinds.items())]
        if any(source in operands(self.linear.piece(value)) for value in region.sums):
            parts.append("the identity")
        before = sum(count for _, count, _ in region.costs)
        kind = f"Conv{len(form.axes)}d" if form.axes else "Linear"
        what = f"{', '.join(parts)} of '{source.name}' merged into {kind} '{path}' ({_size(form)})"
        place = self.linear.behind_same(node)
        return Change(module_path(place), place.name, f"{what}; weights {before} → {form.numel}")


def _noun(layer: Layer) -> str:
    if layer.weighted is None:
        return "padding" if all(axis.count == 1 for axis in layer.axes) else "average pooling"
    return "convolution" if layer.axes else "linear layer"


def _size(form: Stencil) -> str:
    return "x".join(map(str, form.shape)) + (f" in {form.groups} groups" * (form.groups > 1))


class _Surgeon(Editor):
    """Carries merges out on a module."""

    def merge(self, step: Merge) -> None:
        """Put one new layer in the place of what is between the nodes of each site.

        Nobody but the nodes between read what is between, and the node's value is a new tensor as
        that of the layer is, so that what reads or writes it can do so with the other.
        """
        modules = dict(self.module.named_modules(remove_duplicate=False))
        shapes = Shapes(self.module, self.graph, modules)
        linear = Linear(self.module, modules, shapes)
        source, node = (self.nodes[name] for name in step.sites[0])
        layer = _build(linear.kernel(node, source), _layers(linear, node, source))
        self.module.add_submodule(step.path, layer)
        for pair in step.sites:
            source, node = (self.nodes[name] for name in pair)
            with self.graph.inserting_before(node):
                new = self.graph.call_module(step.path, (source,))
            self.place(new, node)
            node.replace_all_uses_with(new)
            self.nodes[node.name] = new
            self.clear_out(linear, node, source)

    def clear_out(self, linear: Linear, node: fx.Node, source: fx.Node) -> None:
        """Erase the nodes between, which nothing reads any more."""
        waiting = [node]
        while waiting:
            value = waiting.pop()
            if value is source or value.users:
                continue
            before = operands(linear.piece(value))
            self.erase(value)
            waiting += [v for v in before if v not in waiting]


def _layers(linear: Linear, node: fx.Node, source: fx.Node) -> list[Tensor]:
    """Return the weights of the layers between two nodes."""
    pieces = (linear.piece(value) for value in between(linear, node, source))
    return [p.weighted.weight for p in pieces if isinstance(p, Layer) and p.weighted is not None]


def _build(kernel: Kernel, weights: list[Tensor]) -> nn.Module:
    """Return the layer that a kernel is, with dtype, device and layout of others."""
    form = kernel.form.even()
    like = max(weights, key=lambda weight: weight.numel())
    layer: nn.Module
    if form.axes:
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(form.axes) - 1]
        layer = kind(
            form.inputs,
            form.outputs,
            tuple(axis.count for axis in form.axes),
            tuple(axis.stride for axis in form.axes),
            tuple(axis.before for axis in form.axes),
            tuple(axis.step or 1 for axis in form.axes),
            form.groups,
            form.shifts,
            form.border or "zeros",
            device="meta",
        )
    else:
        layer = nn.Linear(form.inputs, form.outputs, form.shifts, device="meta")
    as_it_is = form == kernel.form and kernel.scale is None
    if as_it_is:
        weight = kernel.weight.to(like.dtype, copy=True)
    else:
        weight = round_rows(kernel.placed(form), like.dtype).clone()
    if weight.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        weight = weight.contiguous(memory_format=torch.channels_last)
    trains = any(weight.requires_grad for weight in weights)
    layer.weight = nn.Parameter(weight, trains)
    if form.shifts:
        layer.bias = nn.Parameter(kernel.bias.to(like.dtype), trains)
    return layer.train(False)
