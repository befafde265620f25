"""Every source of randomness in a network: what draws, where, at what rate, and when."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx, nn
from torch.nn import functional as F

from dropsurgery.errors import ArgumentTypeError
from dropsurgery.graph.calls import DROPOUTS, bind
from dropsurgery.graph.draws import (
    drawing_call,
    draws_in_code,
    draws_with_a_flag,
    python_draws,
)
from dropsurgery.graph.drops import (
    is_drop,
    is_drop_block,
    is_drop_path,
    is_patch_dropout,
    rate,
    rate_name,
)
from dropsurgery.graph.modes import reads_training
from dropsurgery.graph.module import graphs, module_path
from dropsurgery.graph.trace import trace
from dropsurgery.layers.attention import ScaledDotProductAttention
from dropsurgery.layers.functions import FollowTraining
from dropsurgery.layers.monte_carlo import MonteCarloAttention, MonteCarloMultiheadAttention
from dropsurgery.tables import NOTHING, render

Runs = Literal["in training", "always", "never", "in eval", "fixed by tracing"]

_CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_ALPHA_DROPOUTS = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_ALWAYS_RANDOM = (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class Drop:
    """One source of randomness.

    Attributes:
        module: dotted path of the module whose forward holds the call ("" is the root).
        node: name of the fx node that draws, or that calls the layer which holds what draws; "" for
            Python's own generators, which no graph holds.
        path: dotted path of the layer that draws; "" where a function does.
        kind: the layer's class, or the function's or method's name; both for a raw draw in the
            code of a layer.
        form: what kind of noise: "dropout", "channel dropout", "alpha dropout", "drop path",
            "drop block", "patch dropout", "attention dropout", "recurrent dropout", "random
            activation", "random pooling", "function dropout", "raw draw"; of dropsurgery's own
            layers also "gaussian dropout", "uniform dropout", "classic dropout", "monte-carlo
            dropout", "dropconnect", "weighted channel dropout", "cutout" and "noise" (any other).
        rate: the probability of dropping, in [0, 1]; None where there is none or it is computed.
        runs: "in training" (follows train() and eval()), "always", "never" (its flag is fixed at
            False), "in eval", or "fixed by tracing" (Python's and numpy's generators).
        inside: path of the layer that is called whole and holds this one; "" for none.
        graph: 0 for the graph, or the eval graph of two; 1 for the training graph.
    """

    module: str
    node: str
    path: str
    kind: str
    form: str
    rate: float | None
    runs: Runs
    inside: str = ""
    graph: int = 0


@dataclass(frozen=True)
class Inventory:
    """What `find_drops` returns: the sources of randomness, in the order of the graph.

    Attributes:
        drops: the sources.
    """

    drops: tuple[Drop, ...]

    def __iter__(self) -> Iterator[Drop]:
        return iter(self.drops)

    def __len__(self) -> int:
        return len(self.drops)

    def __str__(self) -> str:
        rows = [
            (
                drop.path or f"{drop.module or '(root)'}: {drop.node or NOTHING}",
                drop.form,
                drop.kind,
                NOTHING if drop.rate is None else f"{drop.rate:.4g}",
                drop.runs,
            )
            for drop in self.drops
        ]
        columns = ("layer, or module: node", "form", "kind", "rate", "runs")
        return render(columns, rows, title=f"{len(rows)} sources of randomness")


def find_drops(model: nn.Module, *, example_inputs: Any = None, zero: bool = False) -> Inventory:
    """Find every source of randomness in a network, wherever it hides.

    Found are all `nn.*Dropout*` layers and functional dropouts, drop path and DropBlock (timm's,
    torchvision's, projects' own copies), timm's PatchDropout, the dropout of
    `scaled_dot_product_attention`, `nn.MultiheadAttention` and recurrent layers, dropsurgery's own
    layers, random activations and poolings, dropout inside layers that stay whole
    (`nn.TransformerEncoderLayer`), raw draws in the graph (`torch.rand`, `Tensor.bernoulli_`, …),
    and raw draws in the code of modules that stay whole. Those last are found by reading bytecode,
    which does not see what is called through a variable.

    The network is read, not run and not changed.

    Args:
        model: any `nn.Module`, or a GraphModule that dropsurgery returned.
        example_inputs: as in `trace`, where the forward needs them.
        zero: list layers whose rate is 0, too.

    Raises:
        TraceError: the network cannot be turned into a graph.
        ArgumentTypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"find_drops takes a torch.nn.Module, got {type(model).__name__}",
            fix="pass the model object",
        )
    module = trace(model, example_inputs=example_inputs)
    found = _merged(list(drops_of(module)), two=len(graphs(module)) == 2)
    inside = {
        path
        for node in module.graph.nodes
        if node.op == "call_module"
        for path, _ in module.get_submodule(str(node.target)).named_modules(prefix=str(node.target))
    }
    for path, layer in model.named_modules():
        if path not in inside:
            found += [
                Drop(path, "", "", name, "raw draw", None, "fixed by tracing")
                for name in python_draws(layer)
            ]
    return Inventory(tuple(drop for drop in found if zero or drop.rate != 0.0))


def drops_of(module: fx.GraphModule) -> Iterator[Drop]:
    """Yield the sources of randomness of a traced network: those of rate 0, and of each graph."""
    for index, graph in enumerate(graphs(module)):
        for node in graph.nodes:
            for drop in _at(module, node):
                yield replace(drop, graph=index)


def _merged(found: list[Drop], *, two: bool) -> list[Drop]:
    """Tell a layer that both graphs call once; a draw that only one graph has runs in that mode."""
    if not two:
        return found
    turns: dict[tuple[object, ...], int] = {}
    keyed = []
    for drop in found:
        call = (drop.graph, drop.module, drop.path, drop.kind)
        turns[call] = turns.get(call, 0) + 1
        keyed.append(((drop.module, drop.path, drop.kind, turns[call]), drop))
    in_graph = [{key for key, drop in keyed if drop.graph == graph} for graph in (0, 1)]
    merged = []
    for key, drop in keyed:
        if key in in_graph[1 - drop.graph]:
            merged += [drop] if drop.graph == 0 else []
        elif drop.runs == "always":
            merged.append(replace(drop, runs="in training" if drop.graph else "in eval"))
        else:
            merged.append(drop)
    return merged


def _at(module: fx.GraphModule, node: fx.Node) -> Iterator[Drop]:
    """Yield the sources at one node."""
    where = module_path(node)
    if node.op == "call_module":
        path = str(node.target)
        layer = module.get_submodule(path)
        if isinstance(layer, FollowTraining):
            yield from _flagged(layer, path, node)
            return
        for name, part in layer.named_modules():
            inner = f"{path}.{name}" if name else path
            for kind, form, p, runs in _of_layer(part):
                yield Drop(where, node.name, inner, kind, form, p, runs, path if name else "")
            if not name and (is_drop(part) or form_of_ours(part) is not None):
                return  # what a drop layer holds is its own
    elif node.op == "call_function" and node.target is F.scaled_dot_product_attention:
        p = attention_arguments(node).get("dropout_p", 0.0)
        if p != 0.0:
            known = float(p) if isinstance(p, int | float) else None
            name = F.scaled_dot_product_attention.__name__
            yield Drop(where, node.name, "", name, "attention dropout", known, "always")
    elif node.op == "call_function" and draws_with_a_flag(node.target):  # type: ignore[arg-type]
        yield from _function(node, where)
    elif (name := drawing_call(node)) is not None:
        yield Drop(where, node.name, "", name, "raw draw", None, "always")


def _function(node: fx.Node, where: str) -> Iterator[Drop]:
    """Yield a functional dropout, whose flag is a constant or computed."""
    given = bind(node.target, node.args, dict(node.kwargs)) or {}  # type: ignore[arg-type]
    in_dropouts = node.target in DROPOUTS
    flag = given.get("training", given.get("train", in_dropouts))
    runs: Runs = "always" if flag is not False else "never"
    p = _constant_rate(given, 0.5 if in_dropouts else None)
    name = getattr(node.target, "__name__", str(node.target))
    form = "random activation" if node.target is F.rrelu else _functional_form(node.target)
    yield Drop(where, node.name, "", name, form, p, runs)


def _functional_form(function: Any) -> str:
    layer = DROPOUTS.get(function)
    if layer is None:
        return (
            "drop path" if "depth" in function.__name__ or "path" in function.__name__ else "noise"
        )
    return _dropout_form(layer)


def _dropout_form(layer: type[nn.Module]) -> str:
    if issubclass(layer, _ALPHA_DROPOUTS):
        return "alpha dropout"
    return "channel dropout" if issubclass(layer, _CHANNEL_DROPOUTS) else "dropout"


def _constant_rate(given: dict[str, Any], default: float | None) -> float | None:
    for name in ("p", "drop_prob", "dropout_p"):
        if name in given:
            value = given[name]
            return float(value) if isinstance(value, int | float) else None
    return default


def _flagged(layer: FollowTraining, path: str, node: fx.Node) -> Iterator[Drop]:
    """Yield the drops of a function that is given the training flag."""
    name = getattr(layer.function, "__name__", "function")
    where = module_path(node)
    rates = flagged_rates(layer, node)
    if layer.function is F.rrelu:
        yield Drop(where, node.name, path, name, "random activation", None, "in training")
    elif draws_with_a_flag(layer.function) or rates:
        known = [value for value in rates.values() if isinstance(value, int | float)]
        p = max(known) if known and len(known) == len(rates) else None
        form = "function dropout"
        if layer.function in DROPOUTS:
            form = _functional_form(layer.function)
        yield Drop(where, node.name, path, name, form, p, "in training")


def matches(drop: Drop, where: str | tuple[str, ...] | None) -> bool:
    """Say whether a pattern, or one of several, means a drop: by its path, module or node."""
    if where is None:
        return True
    names = [name for name in (drop.path, drop.module) if name]
    return any(
        pattern == drop.node or any(fnmatch.fnmatchcase(name, pattern) for name in names)
        for pattern in ((where,) if isinstance(where, str) else where)
    )


def flagged_rates(layer: FollowTraining, node: fx.Node) -> dict[str, Any]:
    """Return the dropout rates that a call of `FollowTraining` is given, by argument."""
    given = bind(layer.function, node.args, {**node.kwargs, layer.argument: False}) or {}
    plain = layer.function in DROPOUTS
    return {k: v for k, v in given.items() if "dropout" in k or (plain and k == "p")}


def attention_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an attention call by name: the function's, or our layer's."""
    own = node.op == "call_module"
    names = [name for name in _ATTENTION_ARGUMENTS if not (own and name == "dropout_p")]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


_OWN_FORMS = {
    "GaussianDropout": "gaussian dropout",
    "UniformDropout": "uniform dropout",
    "ClassicDropout": "classic dropout",
    "MonteCarloDropout": "monte-carlo dropout",
    "DropConnect": "dropconnect",
    "WeightedChannelDropout": "weighted channel dropout",
    "Cutout": "cutout",
}


def form_of_ours(layer: nn.Module) -> str | None:
    """Return the form of one of dropsurgery's own noise layers; None for any other module."""
    home = type(layer).__module__
    if not home.startswith("dropsurgery.layers.") or isinstance(layer, FollowTraining):
        return None
    known = _OWN_FORMS.get(type(layer).__name__)
    return known or ("noise" if rate_name(layer) is not None else None)


def _of_layer(layer: nn.Module) -> Iterator[tuple[str, str, float | None, Runs]]:
    """Yield (kind, form, rate, when) of a layer, what it holds aside."""
    kind = type(layer).__name__
    if is_drop(layer):
        yield kind, _layer_form(layer), rate(layer), "in training"
    elif isinstance(layer, MonteCarloAttention | MonteCarloMultiheadAttention):
        attention: Any = layer
        p = attention.dropout_p if isinstance(layer, MonteCarloAttention) else attention.dropout
        yield kind, "attention dropout", p, "always"
    elif isinstance(layer, ScaledDotProductAttention):
        yield kind, "attention dropout", layer.dropout_p, "in training"
    elif isinstance(layer, nn.MultiheadAttention):
        yield kind, "attention dropout", float(layer.dropout), "in training"
    elif isinstance(layer, nn.RNNBase):
        p = float(layer.dropout) if layer.num_layers > 1 else 0.0
        yield kind, "recurrent dropout", p, "in training"
    elif isinstance(layer, nn.RReLU):
        fixed = 0.0 if layer.lower == layer.upper else None
        yield kind, "random activation", fixed, "in training"
    elif isinstance(layer, _ALWAYS_RANDOM):
        yield kind, "random pooling", None, "always"
    elif (form := form_of_ours(layer)) is not None:
        yield kind, form, rate(layer), "in training" if reads_training(type(layer)) else "always"
    else:
        runs: Runs = "in training" if reads_training(type(layer)) else "always"
        for name in draws_in_code(layer):
            yield f"{kind}: {name}", "raw draw", None, runs


def _layer_form(layer: nn.Module) -> str:
    if is_drop_path(layer):
        return "drop path"
    if is_drop_block(layer):
        return "drop block"
    if is_patch_dropout(layer):
        return "patch dropout"
    return _OWN_FORMS.get(type(layer).__name__) or _dropout_form(type(layer))
