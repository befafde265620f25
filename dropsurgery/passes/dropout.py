"""Every form of dropout in a network, turned into another form or taken out, and back again."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import fx, nn
from torch.nn import functional as F

from dropsurgery.errors import ArgumentError, PassError
from dropsurgery.graph.calls import bind
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.inventory import (
    Drop,
    attention_arguments,
    drops_of,
    flagged_rates,
    matches,
)
from dropsurgery.graph.marks import MASK
from dropsurgery.graph.module import Skip, graphs
from dropsurgery.layers.functions import FollowTraining
from dropsurgery.layers.monte_carlo import MonteCarloAttention, MonteCarloDropout
from dropsurgery.layers.uniform_dropout import UniformDropout
from dropsurgery.passes.base import Change, Pass, Plan
from dropsurgery.passes.conversion import Conversion, Recorder, log_of, write_log
from dropsurgery.passes.decide import Decider, Step
from dropsurgery.passes.stand_ins import Target, attention_class, stand_in
from dropsurgery.passes.undo import undo, undoable
from dropsurgery.passes.where import check_where

To = Literal["identity", "gaussian", "uniform", "classic", "inverted", "monte-carlo", "original"]
Where = str | tuple[str, ...] | Callable[[Drop], bool] | None

_DONE = {
    "identity": "removed", "gaussian": "made Gaussian", "uniform": "made uniform",
    "classic": "made classic", "inverted": "made inverted", "monte-carlo": "made Monte-Carlo",
}  # fmt: skip


@dataclass(frozen=True)
class ConvertDropout(Pass):
    """Turn every form of dropout into another form, or into its eval-time identity, or back.

    Covered is what `ds.find_drops` finds: all `nn.*Dropout*` layers, functional dropout, drop path
    (timm's, torchvision's and dropsurgery's), DropBlock, the dropout of
    `scaled_dot_product_attention`, `nn.MultiheadAttention`, recurrent layers and functions that
    take a `training` flag, and dropout inside layers that stay whole (`TransformerEncoderLayer`).
    With p the drop probability:

    - "identity": nothing is dropped any more, in training either, and no node is left. Exact in
      eval mode, except for dropout that is always on (`F.dropout(x, p)` without `training`).
    - "gaussian": in training the same units are multiplied by N(1, p/(1 - p)), which has the mean
      and variance of inverted dropout (Srivastava et al. 2014, section 10); the identity in eval.
    - "uniform": in training they are multiplied by U(1 - β, 1 + β) with the same variance,
      β = √(3p/(1 - p)), or with the `beta` given (Uout; Li et al. 2018, arXiv:1801.05134).
    - "classic": the form of the first paper (Hinton et al. 2012): a mask without scaling in
      training, a factor 1 - p in eval. The weights behind it are divided by 1 - p, so that the
      network computes in both modes what it computed.
    - "inverted": the usual form. Classic dropout's factor goes into the weights behind it;
      Gaussian, uniform and Monte-Carlo noise becomes the Bernoulli noise of the same variance.
    - "monte-carlo": noise in eval as in training, so that repeated runs sample (Gal and Ghahramani
      2016); see `layers.MonteCarloDropout` and `ds.mc_predict`.
    - "original": what conversions did is taken back, in reverse order: the code, the layers, their
      rates and the weights are what they were.

    The state-dict keys stay. What has no such form (a recurrent layer's dropout, DropBlock, p = 1,
    raw draws) is left alone and listed.

    Args:
        to: one of the forms above.
        where: which drops: a pattern for the path of the layer or of the module that calls it
            (`"layer4.*"`, as in `fnmatch`), the name of a node, a tuple of such, or a callable that
            takes a `Drop` of `ds.find_drops`; every drop without.
        beta: for "uniform", half the width of the noise, 0 or more.
        noise: for "monte-carlo", "bernoulli" or "gaussian"; or "input": each mask is an input of
            the network, behind its own, and what it multiplies is reproducible (`ds.draw_masks`).
        always_on: convert also dropout that drops in eval mode; `slim` leaves it, because taking
            it out changes what the network computes.

    Raises:
        ArgumentError, ArgumentTypeError: an unknown form or noise, an argument that the form does
            not take, a `where` that is none.
        PassError: `where` matches no drop.
    """

    to: To
    where: Where = None
    beta: float | None = None
    noise: Literal["bernoulli", "gaussian", "input"] = "bernoulli"
    always_on: bool = True

    def __post_init__(self) -> None:
        if self.to not in get_args(To):
            known = ", ".join(map(repr, get_args(To)))
            raise ArgumentError(
                f"dropout cannot be converted to {self.to!r}", fix=f"one of {known}"
            )
        if self.noise not in ("bernoulli", "gaussian", "input"):
            raise ArgumentError(
                f"unknown noise {self.noise!r}", fix="'bernoulli', 'gaussian' or 'input'"
            )
        if self.noise != "bernoulli" and self.to != "monte-carlo":
            raise ArgumentError(
                f"noise={self.noise!r} goes with 'monte-carlo', not with {self.to!r}",
                fix=f"ConvertDropout('monte-carlo', noise={self.noise!r})",
            )
        if self.beta is not None:
            if self.to != "uniform":
                raise ArgumentError(
                    f"beta goes with 'uniform', not with {self.to!r}", fix="leave beta out"
                )
            UniformDropout(self.beta)
        fix = "'layer4.*', ('layer3.*', 'head') or lambda drop: drop.form == 'drop path'"
        object.__setattr__(self, "where", check_where(self.where, "drops", fix))

    def plan(self, module: fx.GraphModule) -> Plan:
        """List every drop, and what becomes of it."""
        if self.to == "original":
            return self._plan_original(module)
        drops = list(drops_of(module))
        self._check_where(drops)
        decider = Decider(module, self.to, self._target(), self.noise, self.always_on)
        changes, skipped, steps = [], [], []
        seen: set[object] = set()
        for drop in drops:
            key = drop.path if drop.inside else (drop.graph, drop.node, drop.path)
            if key in seen:
                continue
            seen.add(key)
            if not self._chosen(drop):
                reason = f"'{drop.path or drop.kind}' is not chosen by where={self.where!r}"
                skipped.append(Skip(drop.module, drop.node, reason))
                continue
            step, reason = decider.decide(drop)
            if reason:
                skipped.append(Skip(drop.module, drop.node, f"{step.what}: {reason}"))
            elif step.action != "nothing":
                steps.append(step)
                what = f"{_DONE[self.to]} {step.what}"
                changes.append(Change(drop.module, drop.node, what + _taken(step)))
        return Plan(tuple(changes), tuple(skipped), tuple(steps))

    def _plan_original(self, module: fx.GraphModule) -> Plan:
        log = log_of(module)
        self._check_where([conversion.drop for conversion in log])
        changes, skipped, steps = [], [], []
        for number, reason in undoable(module, lambda drop: self._chosen(drop)):
            drop, what = log[number].drop, log[number].what
            if reason:
                skipped.append(Skip(drop.module, drop.node, f"{what}: {reason}"))
            else:
                steps.append(number)
                changes.append(Change(drop.module, drop.node, f"took back: {what}"))
        if not log:
            skipped.append(Skip("", "", "no dropout of this network was converted"))
        return Plan(tuple(changes), tuple(skipped), tuple(steps))

    def _check_where(self, drops: list[Drop]) -> None:
        # An empty tuple is what a saved surgery holds where a callable changed nothing.
        if self.where in (None, ()) or any(self._chosen(drop) for drop in drops):
            return
        known = list(dict.fromkeys(drop.path or drop.node for drop in drops))
        raise PassError(
            f"where={self.where!r} matches none of the {len(drops)} drops",
            where=", ".join(known[:8]) + (", …" if len(known) > 8 else ""),
            fix="a path or pattern of ds.find_drops(model), or a callable that takes a Drop",
        )

    def _chosen(self, drop: Drop) -> bool:
        if callable(self.where):
            return bool(self.where(drop))
        return matches(drop, self.where)

    def _target(self) -> Target:
        noise = "bernoulli" if self.noise == "input" else self.noise
        return Target(self.to, self.beta, noise)

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Carry out the plan, and write down how to take it back."""
        if self.to == "original":
            undo(module, plan.steps)
            return
        named = [{node.name: node for node in graph.nodes} for graph in graphs(module)]
        recorder = Recorder(module)
        new: list[Conversion] = []
        left: dict[int, tuple[nn.Module, int]] = {}
        worker = _Worker(module, self._target(), recorder)
        for number, step in enumerate(plan.steps):
            drop = step.drop
            if drop.path and step.action in ("erase", "plain", "mask"):
                layer = module.get_submodule(drop.path)
                left[id(layer)] = (layer, number)
            worker.work(step, named[drop.graph][drop.node])
            for path in step.takers:
                recorder.scale(path, step.factor)
            new.append(Conversion(drop, f"{_DONE[self.to]} {step.what}", tuple(recorder.edits)))
            recorder.edits.clear()
        removed = recorder.remove_unused(layer for layer, _ in left.values())
        for key, edit in removed.items():
            number = left[key][1]
            conversion = new[number]
            new[number] = Conversion(conversion.drop, conversion.what, (*conversion.edits, edit))
        write_log(module, (*log_of(module), *new))

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return the parameters; what a callable decided is written down as names of nodes."""
        where = self.where
        if callable(where):
            where = tuple(dict.fromkeys(change.node for change in plan.changes))
        return {
            "pass": self.name,
            "to": self.to,
            "where": list(where) if isinstance(where, tuple) else where,
            "beta": self.beta,
            "noise": self.noise,
            "always_on": self.always_on,
        }


def _taken(step: Step) -> str:
    if not step.takers:
        return ""
    return f"; its factor went into the weight of {', '.join(map(repr, step.takers))}"


class _Worker:
    """Carries out the steps of one conversion."""

    def __init__(self, module: fx.GraphModule, target: Target, recorder: Recorder) -> None:
        self._module = module
        self._target = target
        self._recorder = recorder
        self._new: set[int] = set()
        self._masks: dict[tuple[str, int], list[fx.Node]] = {}
        self._turns: dict[tuple[int, str], int] = {}
        self._shapes = [Shapes(module, graph) for graph in graphs(module)]

    def work(self, step: Step, node: fx.Node) -> None:
        """Carry out one step."""
        drop, recorder = step.drop, self._recorder
        if step.action == "erase":
            recorder.erase(node, drop.graph)
        elif step.action == "plain":
            recorder.change(node, drop.graph, *self._plain_call(node))
        elif step.action == "swap":
            self._swap(drop, node)
        elif step.action == "class":
            layer: Any = self._module.get_submodule(drop.path)
            cls = attention_class(layer, self._target)
            values = {"noise": self._target.noise} if self._target.form == "monte-carlo" else {}
            recorder.set(drop.path, cls=cls, **values)
        elif step.action == "attribute":
            recorder.set(drop.path, dropout=0.0)
        elif step.action == "mask":
            self._mask(step, node)
        else:
            self._add_layer(step, node)
        if drop.inside and self._target.form == "monte-carlo":
            self._no_fast_path(drop)

    def _swap(self, drop: Drop, node: fx.Node) -> None:
        layer = self._module.get_submodule(drop.path)
        if id(layer) in self._new:
            return  # a layer that several calls share
        if self._target.form == "identity":
            new: nn.Module | None = nn.Identity()
        else:
            new = stand_in(
                layer, self._target, lambda: self._shapes[drop.graph].rank(node.all_input_nodes[0])
            )
        assert new is not None
        self._new.add(id(new))
        self._recorder.swap(drop.path, new)

    def _add_layer(self, step: Step, node: fx.Node) -> None:
        """Let a layer do what an always-on function did."""
        drop, noise = step.drop, self._target.noise
        assert drop.rate is not None
        layer: nn.Module
        if node.target is F.scaled_dot_product_attention:
            layer = MonteCarloAttention(drop.rate, noise)
            given = attention_arguments(node)
            given.pop("dropout_p", None)
            args = tuple(given.pop(name) for name in ("query", "key", "value"))
        else:
            layer = MonteCarloDropout(drop.rate, noise, step.units)
            args, given = (node.all_input_nodes[0],), {}
        path = self._recorder.add_layer(drop.module, drop.kind, layer)
        self._recorder.change(node, drop.graph, path, args, given)

    def _mask(self, step: Step, node: fx.Node) -> None:
        """Multiply by an input of the network; a call that both graphs make has one mask."""
        name = step.drop.path or step.drop.module
        turn = self._turns.get((step.drop.graph, name), 0)
        self._turns[step.drop.graph, name] = turn + 1
        key = (name, turn)
        if key not in self._masks:
            mark = {MASK: {"p": step.drop.rate, "units": step.units}}
            count = len(self._masks)
            label = f"mask_{count}" if count else "mask"
            self._masks[key] = [
                self._recorder.add_input(label, index, mark)
                for index in range(len(graphs(self._module)))
            ]
        mask = self._masks[key][step.drop.graph]
        args = (node.all_input_nodes[0], mask)
        self._recorder.change(node, step.drop.graph, operator.mul, args, {})

    def _no_fast_path(self, drop: Drop) -> None:
        """Keep torch's fused kernel, which has no noise, from a transformer layer in eval."""
        leaf = self._module.get_submodule(drop.inside)
        for name, layer in leaf.named_modules(prefix=drop.inside):
            encodes = isinstance(layer, nn.TransformerEncoderLayer)
            if encodes and drop.path.startswith(f"{name}.") and layer.activation_relu_or_gelu:
                self._recorder.set(name, activation_relu_or_gelu=0)

    def _plain_call(self, node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return the same call of the plain function, without dropout."""
        layer = self._module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, FollowTraining):
            given = bind(layer.function, node.args, {**node.kwargs, layer.argument: False}) or {}
            rates = flagged_rates(layer, node)
            first, *rest = given
            return (
                layer.function,
                (given[first],),
                {key: 0.0 if key in rates else given[key] for key in rest},
            )
        given = attention_arguments(node)
        given.pop("dropout_p", None)
        args = tuple(given.pop(name) for name in ("query", "key", "value"))
        return F.scaled_dot_product_attention, args, given
