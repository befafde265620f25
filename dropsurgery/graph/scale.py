"""Parameters whose scale a network cannot see, proved on the graph.

A parameter times a > 0 is followed through the graph: what it reaches becomes a·u, or a·u + k with
a constant k for each channel, until a normalisation divides a out again. Where anything else sees
the factor, the scale is visible.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from dropsurgery.graph.affine import Refused, argument, fetch
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.clone import clone_structure
from dropsurgery.graph.drops import is_drop
from dropsurgery.graph.leaves import forward_owner, has_hooks
from dropsurgery.graph.module import called_module, graphs
from dropsurgery.graph.ops import Kind, kind_of, writes_in_place
from dropsurgery.graph.uses import value_readers
from dropsurgery.graph.weighted import Weighted, read_weighted


class Form(Enum):
    """How a value depends on the factor a."""

    SCALED = auto()  # a·u
    SHIFTED = auto()  # a·u + k, or u + a·k, with k constant over samples and positions
    MIXED = auto()  # some channels a·u, others u


@dataclass(frozen=True)
class Visibility:
    """Whether the network sees the scale of a parameter.

    Attributes:
        name: the parameter's name.
        norms: paths or nodes of the normalisations that divide the scale out; () where it is seen.
        reason: what sees it; "" where nothing does.
        batch: whether one of the normalisations is over the batch: then the scale is invisible in
            training mode only, since running statistics do not follow.
    """

    name: str
    norms: tuple[str, ...]
    reason: str = ""
    batch: bool = False


def visibilities(module: fx.GraphModule, model: nn.Module) -> Iterator[Visibility]:
    """Yield, for the weights and biases of layers with weights and of norms, who sees their scale.

    Args:
        module: the traced network; of two graphs, the training graph counts.
        model: the network that it was traced from, whose flags tell which BatchNorms are frozen.
    """
    graph = graphs(module)[-1]
    walker = _Walker(module, graph, _frozen(module, model))
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    names: dict[int, str] = {}
    for path, layer in module.named_modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((name, layer))
                names.setdefault(id(parameter), f"{path}.{name}" if path else name)
    calls: dict[int, list[fx.Node]] = {}
    read = set()
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(id(module.get_submodule(str(node.target))), []).append(node)
        elif node.op == "get_attr":
            read.add(id(fetch(module, str(node.target))))
    for key, held in holders.items():
        sources = [(node, name) for name, layer in held for node in calls.get(id(layer), ())]
        try:
            if key in read:
                raise Refused("the graph reads it by itself")
            if not all(id(layer) in calls for _, layer in held):
                raise Refused("its layer is not called by the graph, but by another layer or never")
            norms, batch = walker.walk(sources)
            yield Visibility(names[key], norms, batch=batch)
        except Refused as reason:
            yield Visibility(names[key], (), str(reason))


def _frozen(module: fx.GraphModule, model: nn.Module) -> set[str]:
    """Return the paths of the layers that training leaves in eval mode."""
    shadow = clone_structure(module)
    shadow.train()
    networks = (shadow, module) if model.training else (shadow,)
    return {
        path
        for network in networks
        for path, layer in network.named_modules(remove_duplicate=False)
        if not layer.training
    }


class _Walker:
    """Follows factors through a graph."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, frozen: set[str]) -> None:
        self._module = module
        self._frozen = frozen
        self._nodes = list(graph.nodes)
        self._order = {node: index for index, node in enumerate(self._nodes)}
        self._shapes = Shapes(module, graph)

    def walk(self, sources: list[tuple[fx.Node, str]]) -> tuple[tuple[str, ...], bool]:
        """Return the normalisations that divide the factor out, and whether one is over the batch.

        Args:
            sources: the calls that use the parameter, and its name there.

        Raises:
            Refused: something sees the factor.
        """
        starts: dict[fx.Node, list[str]] = {}
        for node, name in sources:
            starts.setdefault(node, []).append(name)
        waiting = [self._order[node] for node in starts]
        heapq.heapify(waiting)
        forms: dict[fx.Node, Form] = {}
        norms: dict[str, None] = {}
        batch, last = False, -1
        while waiting:
            index = heapq.heappop(waiting)
            if index == last:
                continue
            node, last = self._nodes[index], index
            called = called_module(self._module, node)
            reads = [v for v in node.all_input_nodes if v in forms and node in value_readers(v)]
            if called is not None and has_hooks(called):
                raise Refused(f"the hooks of '{node.target}' may see it")
            if not reads:
                forms[node] = self._start(node, called, starts[node])
            elif node in starts:
                raise Refused(f"'{node.name}' multiplies it with itself")
            elif self._divides_out(node, called, [forms[value] for value in reads]):
                norms[str(node.target) if called is not None else node.name] = None
                batch = batch or isinstance(called, _BatchNorm)
                continue
            else:
                forms[node] = self._through(node, called, reads, forms)
            for user in value_readers(node):
                heapq.heappush(waiting, self._order[user])
        if not norms:
            raise Refused("nothing reads it")
        return tuple(norms), batch

    def _start(self, node: fx.Node, called: nn.Module | None, names: list[str]) -> Form:
        """Return what a layer makes of a factor in its own parameter."""
        layer: Any = called
        if parametrize.is_parametrized(layer):
            raise Refused("its layer computes it by a parametrization")
        normalises = isinstance(layer, _NORMS)
        known = read_weighted(self._module, node, called) is not None or (
            normalises and forward_owner(layer).startswith("torch.nn.")
        )
        if not known or len(names) > 1:
            raise Refused(f"{type(layer).__name__} is no layer whose use of it is known")
        if names == ["weight"] and getattr(layer, "bias", None) is None:
            return Form.SCALED
        return self._shifted(node, called)

    def _shifted(self, node: fx.Node, called: nn.Module | None) -> Form:
        """Return the form of a value with a constant on axis 1, which the graph must prove."""
        last = isinstance(called, nn.Linear | nn.LayerNorm)
        if last and self._shapes.rank(node) != 2:
            raise Refused(f"the bias of '{node.target}' may lie on another axis than the norm's")
        return Form.SHIFTED

    def _divides_out(self, node: fx.Node, called: nn.Module | None, forms: list[Form]) -> bool:
        """Say whether a node is a normalisation that removes factors of these forms."""
        if len(forms) != 1:
            return False
        if isinstance(called, _BatchNorm):
            owner = forward_owner(called)
            known = owner.startswith("torch.nn.") or owner in _NORM_SUBCLASSES
            return known and str(node.target) not in self._frozen
        if isinstance(called, _InstanceNorm):
            return not called.track_running_stats
        alone = forms == [Form.SCALED]
        if isinstance(called, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            return alone and forward_owner(called).startswith("torch.nn.")
        if node.op == "call_function" and node.target in _NORM_FUNCTIONS:
            return alone and node.all_input_nodes[0] is argument(node, 0, "input")
        return False

    def _through(
        self,
        node: fx.Node,
        called: nn.Module | None,
        reads: list[fx.Node],
        forms: dict[fx.Node, Form],
    ) -> Form:
        """Return the form of a node that reads factors.

        Raises:
            Refused: it sees them.
        """
        found = {forms[value] for value in reads}
        weighted = read_weighted(self._module, node, called)
        if weighted is not None and len(reads) == 1:
            return self._through_weights(node, called, weighted, found.pop())
        kind = kind_of(self._module, node)
        if writes_in_place(self._module, node) and len(reads[0].users) > 1:
            raise Refused(f"'{node.name}' writes in place into what others read")
        if kind is Kind.CONCAT and Form.SHIFTED not in found:
            whole = len(reads) == len(node.all_input_nodes)
            if whole and found == {Form.SCALED}:
                return Form.SCALED
            if argument(node, 1, "dim", 0) == 1:
                return Form.MIXED
        elif kind in (Kind.ADD, Kind.SUB) and len(reads) == len(node.all_input_nodes) == 2:
            if found == {Form.SCALED}:
                return Form.SCALED
        elif kind is Kind.PRODUCT and len(reads) == 1 and found == {Form.SCALED}:
            if node.all_input_nodes[0] is reads[0] or not _divides(node):
                return Form.SCALED
        elif len(reads) == 1 == len(node.all_input_nodes):
            form = found.pop()
            passes = {
                Form.SCALED: _factor_passes, Form.MIXED: _mixed_passes, Form.SHIFTED: _shift_passes
            }[form]  # fmt: skip
            if passes(node, called, kind):
                return form
        raise Refused(f"'{node.name}' sees it")

    def _through_weights(
        self, node: fx.Node, called: nn.Module | None, weighted: Weighted, form: Form
    ) -> Form:
        if form is Form.MIXED:
            raise Refused(f"'{node.name}' mixes channels with and without it")
        if form is Form.SCALED and weighted.bias is None:
            return Form.SCALED
        if form is Form.SHIFTED and not isinstance(called, nn.Linear):
            # Padding with zeros makes another value of a constant at the border.
            raise Refused(f"'{node.name}' may pad a bias")
        return self._shifted(node, called)


def _factor_passes(node: fx.Node, called: nn.Module | None, kind: Kind) -> bool:
    """Say whether f(a·u) = a·f(u) for every a > 0."""
    if node.op == "call_function" and node.target in _HOMOGENEOUS_FUNCTIONS:
        return True
    if node.op == "call_method" and node.target in ("relu", "relu_", "mean", "sum", "neg"):
        return True
    return _mixed_passes(node, called, kind) or kind in (Kind.ALIAS, Kind.SLICE, Kind.POOL)


def _mixed_passes(node: fx.Node, called: nn.Module | None, kind: Kind) -> bool:
    """Say whether f(a·u) = a·f(u) for every channel (axis 1) by itself, which stays where it is."""
    if called is not None and is_drop(called):
        return not isinstance(called, nn.AlphaDropout | nn.FeatureAlphaDropout)
    relu = node.op == "call_function" and node.target in (F.relu, torch.relu)
    return relu or isinstance(called, (*_HOMOGENEOUS, *_MAX_POOLS))


def _shift_passes(node: fx.Node, called: nn.Module | None, kind: Kind) -> bool:
    """Say whether f(a·u + k) = a·f(u) + k for a constant k of each channel."""
    if isinstance(called, (nn.Identity, *_MAX_POOLS, *_ADAPTIVE_POOLS)):
        return True  # max pooling pads with minus infinity
    return node.op == "call_method" and node.target in ("contiguous", "clone")


_HOMOGENEOUS = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Upsample,
)  # fmt: skip
_HOMOGENEOUS_FUNCTIONS = frozenset(
    {F.relu, torch.relu, F.leaky_relu, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
     F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.mean, torch.sum,
     F.interpolate, torch.neg}
)  # fmt: skip
_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# BatchNorm, then an activation of what is normalised.
_NORM_SUBCLASSES = frozenset({"timm.layers.norm_act.BatchNormAct2d"})
_NORM_FUNCTIONS = frozenset({F.layer_norm, F.group_norm, F.rms_norm, F.normalize})
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def _divides(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", str(node.target)).rstrip("_") in (
        "truediv", "div", "itruediv", "divide",
    )  # fmt: skip
