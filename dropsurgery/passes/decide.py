"""What is to become of one drop, and why it is left alone where it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx, nn
from torch.nn import functional as F

from dropsurgery.graph.affine import Refused
from dropsurgery.graph.calls import DROPOUTS, bind
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.drops import is_classic, is_drop, rate
from dropsurgery.graph.inventory import Drop, flagged_rates
from dropsurgery.graph.leaves import has_hooks
from dropsurgery.graph.module import graphs
from dropsurgery.graph.uses import Uses
from dropsurgery.layers.attention import ScaledDotProductAttention
from dropsurgery.layers.functions import FollowTraining
from dropsurgery.layers.monte_carlo import (
    MonteCarloAttention,
    MonteCarloDropout,
    MonteCarloMultiheadAttention,
)
from dropsurgery.layers.noise import Units
from dropsurgery.passes.stand_ins import Target, attention_class, stand_in, takers, units_of

_MONTE_CARLO = (MonteCarloDropout, MonteCarloAttention, MonteCarloMultiheadAttention)
# "erase" a call; make it a "plain" one; "swap" its layer; change its "class" or an "attribute";
# multiply by a "mask" input; let a new "layer" do it.
Action = Literal["nothing", "erase", "plain", "swap", "class", "attribute", "mask", "layer"]


@dataclass(frozen=True)
class Step:
    """One drop, and what is done to it.

    Attributes:
        action: what is done.
        drop: the drop.
        what: the drop in words.
        units: which units share a draw.
        factor: what the weights of `takers` are multiplied by.
        takers: paths of the layers that take the factor.
    """

    action: Action
    drop: Drop
    what: str
    units: Units = "element"
    factor: float = 1.0
    takers: tuple[str, ...] = ()


class Decider:
    """Decides what becomes of the drops of a network.

    Args:
        module: the network, which is only read.
        to: the form that was asked for.
        target: that form with its parameters.
        noise: "input" where masks become inputs.
        always_on: whether drops that are on in eval are converted.
    """

    def __init__(
        self, module: fx.GraphModule, to: str, target: Target, noise: str, always_on: bool
    ) -> None:
        self._module = module
        self._to = to
        self._target = target
        self._as_input = noise == "input"
        self._always_on = always_on
        self._named = [{node.name: node for node in graph.nodes} for graph in graphs(module)]
        self._shapes: dict[int, Shapes] = {}
        self._uses: Uses | None = None

    def decide(self, drop: Drop) -> tuple[Step, str]:
        """Return what is done to a drop, and why it is left alone, or ""."""
        node = self._named[drop.graph][drop.node]
        layer = self._module.get_submodule(drop.path) if drop.path else None
        what = _function_words(drop) if layer is None else self._words(drop, node, layer)
        step = Step("nothing", drop, what)
        try:
            if layer is None:
                return self._function(step, node), ""
            return self._layer(step, node, layer), ""
        except Refused as reason:
            return step, str(reason)

    def _words(self, drop: Drop, node: fx.Node, layer: nn.Module) -> str:
        if isinstance(layer, FollowTraining):
            rates = ", ".join(f"{k}={v}" for k, v in flagged_rates(layer, node).items())
            return f"dropout of {drop.kind}({rates}) '{drop.path}'"
        p = "" if drop.rate is None else f" p={drop.rate:.4g}"
        if isinstance(layer, nn.RNNBase):
            return f"dropout{p} between the layers of {drop.kind} '{drop.path}'"
        if isinstance(layer, ScaledDotProductAttention):
            return f"attention dropout{p} '{drop.path}'"
        if isinstance(layer, nn.MultiheadAttention):
            return f"attention dropout{p} of {drop.kind} '{drop.path}'"
        inside = ""
        if drop.inside:
            inside = f" inside {type(self._module.get_submodule(drop.inside)).__name__}"
        return f"{drop.kind}{p} '{drop.path}'{inside}"

    def _layer(self, step: Step, node: fx.Node, layer: nn.Module) -> Step:
        drop, identity = step.drop, self._to == "identity"
        if identity and isinstance(layer, _MONTE_CARLO):
            self._check_always_on()
        if isinstance(layer, FollowTraining):
            return self._flagged(step, node, layer)
        if isinstance(layer, ScaledDotProductAttention):
            return self._attention(step, layer)
        if isinstance(layer, nn.MultiheadAttention | nn.RNNBase):
            return self._with_attribute(step, layer)
        if isinstance(layer, MonteCarloDropout) or is_drop(layer) or is_classic(layer):
            if has_hooks(layer):
                raise Refused("its forward hooks would be lost")
            if drop.inside:
                return self._inside(step, layer)
            if identity and not is_classic(layer):
                return replace(step, action="erase")
            if identity:
                return self._with_factor(replace(step, action="erase"), node, 1.0 - rate(layer))
            return self._swapped(step, node, layer)
        raise Refused("it is no dropout: what its draws mean is not known")

    def _swapped(self, step: Step, node: fx.Node, layer: nn.Module) -> Step:
        source = node.all_input_nodes[0]
        new = stand_in(layer, self._target, lambda: self._rank(step.drop.graph, source))
        if new is None:
            return step
        if getattr(layer, "inplace", False) and len(source.users) > 1:
            raise Refused("it works in place on a tensor that others read")
        step = replace(step, units=units_of(layer))
        if self._as_input:
            if rate(layer) == 0.0:
                return step
            return replace(step, action="mask")
        step = replace(step, action="swap")
        if self._to == "classic":
            return self._with_factor(step, node, 1.0 / (1.0 - rate(layer)))
        if is_classic(layer):
            return self._with_factor(step, node, 1.0 - rate(layer))
        return step

    def _with_factor(self, step: Step, node: fx.Node, factor: float) -> Step:
        """Let the weights behind a node take a factor, unless it is 1."""
        if factor == 1.0:
            return step
        if len(self._named) > 1:
            raise Refused("the network has two graphs, whose weights its factor would change")
        called = self._module.get_submodule(str(node.target))
        if self._uses is None:
            modules = dict(self._module.named_modules(remove_duplicate=False))
            self._uses = Uses(self._module, self._module.graph, modules)
        if len(self._uses.calls(called)) > 1:
            raise Refused("several calls share it, and its factor would be taken twice")
        return replace(step, factor=factor, takers=takers(self._module, node, self._uses))

    def _rank(self, graph: int, node: fx.Node) -> int | None:
        if graph not in self._shapes:
            self._shapes[graph] = Shapes(self._module, graphs(self._module)[graph])
        return self._shapes[graph].rank(node)

    def _inside(self, step: Step, layer: nn.Module) -> Step:
        """Decide on a drop layer that a layer which stays whole calls by itself."""
        if rate(layer) == 0.0:
            return step
        if self._to == "identity" and not is_classic(layer):
            return replace(step, action="swap")
        if is_classic(layer) or self._to == "classic":
            raise Refused(f"the weights behind it are inside '{step.drop.inside}'")
        self._check_no_input()
        new = stand_in(layer, self._target, lambda: None)
        return step if new is None else replace(step, action="swap")

    def _attention(self, step: Step, layer: ScaledDotProductAttention) -> Step:
        if self._to == "identity":
            return replace(step, action="plain")
        self._check_no_input()
        new = stand_in(layer, self._target, lambda: None)
        return step if new is None else replace(step, action="swap")

    def _with_attribute(self, step: Step, layer: nn.MultiheadAttention | nn.RNNBase) -> Step:
        if layer.dropout == 0.0 or step.drop.rate == 0.0:
            return step
        if self._to == "identity":
            return replace(step, action="attribute")
        if isinstance(layer, nn.RNNBase):
            raise Refused("it happens inside a fused layer")
        self._check_no_input()
        cls = attention_class(layer, self._target)
        return step if cls is None else replace(step, action="class")

    def _flagged(self, step: Step, node: fx.Node, layer: FollowTraining) -> Step:
        rates = flagged_rates(layer, node)
        if not rates:
            raise Refused("it is no dropout: what its draws mean is not known")
        if self._to == "identity":
            return replace(step, action="plain")
        if all(value == 0 for value in rates.values()):
            return step
        raise Refused("it happens inside a function")

    def _function(self, step: Step, node: fx.Node) -> Step:
        """Decide on a function that draws whatever the mode, or never."""
        attention = node.target is F.scaled_dot_product_attention
        if not attention and node.target not in DROPOUTS:
            raise Refused("it is no dropout: what its draws mean is not known")
        if step.drop.runs == "never":
            if self._to == "identity":
                return replace(step, action="erase")
            raise Refused("its training flag is fixed at False: it never drops")
        if self._to == "identity":
            self._check_always_on()
            return replace(step, action="plain" if attention else "erase")
        if self._to != "monte-carlo":
            raise Refused("it drops in eval too, which the form asked for does not")
        return self._monte_carlo_function(step, node, attention=attention)

    def _monte_carlo_function(self, step: Step, node: fx.Node, *, attention: bool) -> Step:
        p = step.drop.rate
        if p is None or p == 1.0:
            raise Refused("its rate is computed" if p is None else "nothing is left at p = 1")
        if attention:
            self._check_no_input()
            return replace(step, action="layer")
        layer = DROPOUTS[node.target]  # type: ignore[index]
        if issubclass(layer, nn.AlphaDropout | nn.FeatureAlphaDropout):
            raise Refused("alpha dropout also adds, which a mask does not")
        given: dict[str, Any] = bind(node.target, node.args, dict(node.kwargs)) or {}  # type: ignore[arg-type]
        if given.get("inplace") and len(node.all_input_nodes[0].users) > 1:
            raise Refused("it works in place on a tensor that others read")
        step = replace(step, units=units_of(layer()))
        return replace(step, action="mask" if self._as_input else "layer")

    def _check_always_on(self) -> None:
        if not self._always_on:
            raise Refused("it drops in eval too: taking it out changes the network's output")

    def _check_no_input(self) -> None:
        if self._as_input:
            raise Refused("its mask is made inside the layer and cannot be an input")


def _function_words(drop: Drop) -> str:
    p = "" if drop.rate is None else f" p={drop.rate}"
    if drop.form == "attention dropout":
        return f"always-on attention dropout{p}"
    if drop.form == "raw draw":
        return f"raw draw {drop.kind}"
    always = "" if drop.runs == "never" else "always-on "
    return f"{always}functional {drop.kind}{p}"
