"""Every form of dropout in a network, turned into its eval-time identity or into Gaussian noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn
from torch.nn import functional as F

from dropsurgery.errors import ArgumentError
from dropsurgery.graph.calls import DROPOUTS, bind
from dropsurgery.graph.drops import is_drop, is_drop_block, is_drop_path, is_patch_dropout, rate
from dropsurgery.graph.leaves import has_hooks
from dropsurgery.graph.module import Skip, graphs, module_path, place_like
from dropsurgery.layers.attention import GaussianMultiheadAttention, ScaledDotProductAttention
from dropsurgery.layers.dropout import GaussianDropout
from dropsurgery.layers.functions import FollowTraining
from dropsurgery.passes.base import Change, Pass, Plan

_CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


Action = Literal["bypass", "gaussian", "plain call", "inside"]


@dataclass(frozen=True)
class _Step:
    """One call (node of graph number `graph`), or one layer at `path` inside a leaf."""

    action: Action
    node: str
    graph: int = 0
    path: str = ""


@dataclass(frozen=True)
class ConvertDropout(Pass):
    """Turn every form of dropout into its eval-time identity, or into Gaussian noise.

    Covered are all `nn.*Dropout*` layers, functional dropout, drop path (timm's, torchvision's and
    dropsurgery's), timm's and torchvision's DropBlock, the dropout of
    `scaled_dot_product_attention`, `nn.MultiheadAttention`, recurrent layers and functions that
    take a `training` flag, and dropout inside layers that stay whole (`TransformerEncoderLayer`).

    - "identity": nothing is dropped any more, in training either, and no node is left. Exact in
      eval mode, except for dropout that is always on (`F.dropout(x, p)` without `training`).
    - "gaussian": in training the same units are multiplied by N(1, p/(1 - p)), which has the mean
      and variance of inverted dropout (Srivastava et al. 2014, section 10); the identity in eval.

    The state-dict keys stay. What has no Gaussian form (a recurrent layer's dropout, DropBlock,
    p = 1, always-on dropout) is left alone and listed.

    Args:
        to: "identity" or "gaussian".
        always_on: convert also dropout that drops in eval mode; `slim` leaves it, because taking
            it out changes what the network computes.

    Raises:
        ArgumentError: an unknown target.
    """

    to: Literal["identity", "gaussian"]
    always_on: bool = True

    def __post_init__(self) -> None:
        if self.to not in ("identity", "gaussian"):
            raise ArgumentError(
                f"dropout cannot be converted to {self.to!r}", fix="'identity' or 'gaussian'"
            )

    def plan(self, module: fx.GraphModule) -> Plan:
        """List every drop, and what becomes of it."""
        changes: list[Change] = []
        skipped: list[Skip] = []
        steps: list[_Step] = []
        converted: set[str] = set()
        for index, graph in enumerate(graphs(module)):
            for node in graph.nodes:
                for step, what, reason in self._convert(module, node, index):
                    seen = step.path if step.action == "inside" else f"{index} {step.node}"
                    if seen in converted:
                        continue
                    converted.add(seen)
                    if reason:
                        skipped.append(Skip(module_path(node), node.name, f"{what}: {reason}"))
                        continue
                    steps.append(step)
                    verb = "removed" if self.to == "identity" else "made Gaussian"
                    changes.append(Change(module_path(node), node.name, f"{verb} {what}"))
        return Plan(tuple(changes), tuple(skipped), tuple(steps))

    def _convert(
        self, module: fx.GraphModule, node: fx.Node, index: int
    ) -> Iterator[tuple[_Step, str, str]]:
        """Yield (step, what it is, why it is left alone or "") for the drops at one node."""
        if node.op == "call_function":
            found = self._function(node, index)
            if found is not None:
                yield found
        elif node.op == "call_module":
            path = str(node.target)
            layer = module.get_submodule(path)
            if is_drop(layer):
                yield self._layer(layer, path, node, index)
            elif isinstance(layer, ScaledDotProductAttention):
                what = f"attention dropout p={layer.dropout_p:.4g} '{path}'"
                reason = self._no_gaussian(layer.dropout_p)
                action: Action = "plain call" if self.to == "identity" else "gaussian"
                yield _Step(action, node.name, index, path), what, reason
            elif isinstance(layer, FollowTraining):
                found = self._flagged(layer, path, node, index)
                if found is not None:
                    yield found
            else:
                yield from self._inside(layer, path, node, index)

    def _layer(
        self, layer: nn.Module, path: str, node: fx.Node, index: int
    ) -> tuple[_Step, str, str]:
        what = f"{type(layer).__name__} p={rate(layer):.4g} '{path}'"
        if has_hooks(layer):
            return _Step("bypass", node.name, index, path), what, "its forward hooks would be lost"
        if self.to == "identity":
            return _Step("bypass", node.name, index, path), what, ""
        reason = self._no_gaussian(rate(layer))
        if is_drop_block(layer) or is_patch_dropout(layer):
            reason = "it drops regions, which has no Gaussian form"
        elif getattr(layer, "inplace", False) and len(node.all_input_nodes[0].users) > 1:
            reason = "it works in place on a tensor that others read"
        return _Step("gaussian", node.name, index, path), what, reason

    def _function(self, node: fx.Node, index: int) -> tuple[_Step, str, str] | None:
        if node.target is F.scaled_dot_product_attention:
            p = _attention_arguments(node).get("dropout_p", 0.0)
            if p == 0.0:
                return None
            step = _Step("plain call", node.name, index)
            what = f"always-on attention dropout p={p}"
        elif node.target in DROPOUTS:
            arguments = bind(node.target, node.args, dict(node.kwargs)) or {}
            step = _Step("bypass", node.name, index)
            what = f"functional {node.target.__name__} p={arguments.get('p', 0.5)}"
            flag = arguments.get("training", arguments.get("train", True))
            if flag is False and self.to == "gaussian":
                return step, what, "its training flag is fixed at False: it never drops"
            if flag is False:
                return step, what, ""
            what = f"always-on {what}"
        else:
            return None
        if self.to == "gaussian":
            return step, what, "it drops in eval too, which Gaussian dropout does not"
        if not self.always_on:
            return step, what, "it drops in eval too: taking it out changes the network's output"
        return step, what, ""

    def _flagged(
        self, layer: FollowTraining, path: str, node: fx.Node, index: int
    ) -> tuple[_Step, str, str] | None:
        name = getattr(layer.function, "__name__", "function")
        given = bind(layer.function, node.args, {**node.kwargs, layer.argument: False}) or {}
        rates = {key: value for key, value in given.items() if "dropout" in key}
        if not rates:
            return None
        what = f"dropout of {name}({', '.join(f'{k}={v}' for k, v in rates.items())}) '{path}'"
        step = _Step("plain call", node.name, index, path)
        if self.to == "identity":
            return step, what, ""
        if all(value == 0 for value in rates.values()):
            return None
        return step, what, "it happens inside a function"

    def _inside(
        self, leaf: nn.Module, path: str, node: fx.Node, index: int
    ) -> Iterator[tuple[_Step, str, str]]:
        """Yield the drops of a leaf that is no drop layer itself."""
        for name, layer in leaf.named_modules():
            where = f"{path}.{name}" if name else path
            step = _Step("inside", node.name, index, where)
            kind = type(layer).__name__
            if is_drop(layer) and name and rate(layer) > 0.0:
                reason = "it drops regions" if is_drop_block(layer) else ""
                reason = reason if self.to == "gaussian" else ""
                what = f"{kind} p={rate(layer):.4g} '{where}' inside {type(leaf).__name__}"
                yield step, what, reason or self._no_gaussian(rate(layer))
            elif isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0.0:
                what = f"attention dropout p={layer.dropout:.4g} of {kind} '{where}'"
                reason = self._no_gaussian(layer.dropout)
                plain = (nn.MultiheadAttention, GaussianMultiheadAttention)
                if self.to == "gaussian" and type(layer) not in plain:
                    reason = f"{kind} is a subclass with its own forward"
                yield step, what, reason
            elif isinstance(layer, nn.RNNBase) and layer.dropout > 0.0:
                what = f"dropout p={layer.dropout:.4g} between the layers of {kind} '{where}'"
                reason = "" if self.to == "identity" else "it happens inside a fused layer"
                yield step, what, reason

    def _no_gaussian(self, p: float) -> str:
        return "its variance is infinite at p = 1" if self.to == "gaussian" and p == 1.0 else ""

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Carry out the plan; layers that nothing calls any more leave the module tree."""
        named = [{node.name: node for node in graph.nodes} for graph in graphs(module)]
        orphans: set[str] = set()
        for step in plan.steps:
            node = named[step.graph][step.node]
            if step.action == "inside":
                self._perform_inside(module, step.path)
            elif step.action == "gaussian":
                _swap(module, step.path, _gaussian(module.get_submodule(step.path)))
            else:
                orphans.add(step.path)
                new = node.all_input_nodes[0]
                if step.action == "plain call":
                    new = _plain_call(module, node)
                node.replace_all_uses_with(new)
                node.graph.erase_node(node)
        self._take_out(module, orphans - {""})

    def _take_out(self, module: fx.GraphModule, paths: set[str]) -> None:
        """Take layers out of the module tree, under all their names, that nothing uses any more."""
        calls = (n for graph in graphs(module) for n in graph.nodes if n.op == "call_module")
        called = {id(module.get_submodule(str(node.target))) for node in calls}
        layers = {id(module.get_submodule(path)) for path in paths} - called
        in_use = [path for path, leaf in module.named_modules() if id(leaf) in called and path]
        for path, layer in list(module.named_modules(remove_duplicate=False)):
            # A layer inside a leaf is the leaf's own, whoever else called it.
            inside = any(path.startswith(f"{leaf}.") for leaf in in_use)
            if id(layer) in layers and not inside:
                module.delete_submodule(path)

    def _perform_inside(self, module: fx.GraphModule, path: str) -> None:
        layer = module.get_submodule(path)
        if is_drop(layer):
            new = nn.Identity() if self.to == "identity" else _gaussian(layer)
            _swap(module, path, new.train(layer.training))
        elif self.to == "identity":
            layer.dropout = 0.0  # type: ignore[assignment]
        else:
            # Same parameters and state-dict keys; only the forward is another.
            layer.__class__ = GaussianMultiheadAttention


def _gaussian(layer: nn.Module) -> nn.Module:
    """Return the Gaussian layer for a Bernoulli one, in the same mode."""
    new: nn.Module
    if isinstance(layer, ScaledDotProductAttention):
        new = ScaledDotProductAttention(layer.dropout_p, "gaussian")
    elif isinstance(layer, GaussianDropout):
        new = layer
    elif is_drop_path(layer):
        new = GaussianDropout(rate(layer), str(getattr(layer, "mode", "row")))
    else:
        units = "channel" if isinstance(layer, _CHANNEL_DROPOUTS) else "element"
        new = GaussianDropout(rate(layer), units)
    return new.train(layer.training)


def _plain_call(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Replace a call that drops by the same call of the plain function, without dropout."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
    else:
        layer = ScaledDotProductAttention()
    args: tuple[Any, ...]
    if isinstance(layer, FollowTraining):
        target = layer.function
        given = bind(target, node.args, {**node.kwargs, layer.argument: False}) or {}
        first, *rest = given
        kwargs = {key: 0.0 if "dropout" in key else given[key] for key in rest}
        args = (given[first],)
    else:
        target = F.scaled_dot_product_attention
        given = _attention_arguments(node)
        given.pop("dropout_p", None)
        args = tuple(given.pop(name) for name in _SDPA_ARGUMENTS[:3])
        kwargs = given
    with node.graph.inserting_before(node):
        call = node.graph.call_function(target, args, kwargs)
    place_like(call, node)
    return call


def _attention_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an attention call by name: the function's, or our layer's."""
    own = node.op == "call_module"
    names = [name for name in _SDPA_ARGUMENTS if not (own and name == "dropout_p")]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _swap(module: nn.Module, path: str, new: nn.Module) -> None:
    prefix, _, name = path.rpartition(".")
    setattr(module.get_submodule(prefix), name, new)
