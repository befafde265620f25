"""DropConnect on the weights of linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from dropsurgery.errors import ArgumentError
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.drops import INSERTED_DROP
from dropsurgery.graph.leaves import forward_owner, has_hooks
from dropsurgery.graph.module import called_module, graphs, module_path, place_like
from dropsurgery.layers.drop_connect import DropConnect, linear
from dropsurgery.layers.noise import check_rate
from dropsurgery.passes.base import Plan
from dropsurgery.passes.insert_base import Insertion, Unusable, mark, place_layer
from dropsurgery.passes.insert_choice import Found, Kinds, check_kinds

_LAYERS = ("Linear", "conv")
_CONVS: dict[str, Callable[..., Any]] = {
    "torch.nn.modules.conv.Conv1d": F.conv1d,
    "torch.nn.modules.conv.Conv2d": F.conv2d,
    "torch.nn.modules.conv.Conv3d": F.conv3d,
}
_TRANSPOSED: dict[str, Callable[..., Any]] = {
    "torch.nn.modules.conv.ConvTranspose1d": F.conv_transpose1d,
    "torch.nn.modules.conv.ConvTranspose2d": F.conv_transpose2d,
    "torch.nn.modules.conv.ConvTranspose3d": F.conv_transpose3d,
}
_LINEAR = "torch.nn.modules.linear.Linear"


@dataclass(frozen=True)
class InsertDropConnect(Insertion):
    """Drop weights of chosen linear layers and convolutions: `ds.layers.DropConnect`.

    The call of a layer becomes the function call that the layer makes, with its weight read from
    the graph and passed through the drop. Parameters, state-dict keys, stride, padding mode and
    groups stay what they are, tied weights stay tied, and the eval output is bit-identical; the
    module itself stays in its place and is not called. `ds.RemoveDrops()` restores the call.

    Args:
        p: drop probability of a weight, in [0, 1).
        per_sample: one mask for each sample, which takes N times the memory of the weight; linear
            layers only.
        of: which kinds of layers, as in `after` of `Insertion`.

    `where`, `skip_first` and `skip_last` choose among them; see `Insertion`.

    Raises:
        ArgumentError, ArgumentTypeError: p outside [0, 1), or `before` or `after` given.
        PassError: no layer matches, or none of them can be opened; or the network's training
            graph could not be traced.
    """

    p: float = 0.5
    per_sample: bool = False
    of: Kinds = _LAYERS

    layer_name: ClassVar[str] = "drop_connect"

    def __post_init__(self) -> None:
        if self.before is not None or self.after is not None:
            raise ArgumentError(
                "InsertDropConnect drops weights, neither before nor after a layer",
                fix="of='Linear', or of='conv'",
            )
        object.__setattr__(self, "of", check_kinds(self.of, "of"))
        super().__post_init__()
        object.__setattr__(self, "p", check_rate(self.p))

    def _take_usual(self) -> None:
        """Leave the places to `of`."""

    @property
    def kinds(self) -> Kinds:
        """Which kinds of layers there are to choose from."""
        return self.of

    def layer(self, form: int) -> nn.Module:
        """Return a new layer."""
        return DropConnect(self.p, self.per_sample)

    def form_at(
        self, module: fx.GraphModule, shapes: Shapes, spot: Found, node: fx.Node, value: fx.Node
    ) -> int:
        """Return 0 where the call can be opened."""
        called = called_module(module, node)
        if called is None:
            raise Unusable("it is a function call, whose weight is no layer's")
        owner = forward_owner(called)
        if owner not in (_LINEAR, *_CONVS, *_TRANSPOSED):
            raise Unusable(f"{type(called).__name__} has a forward of its own")
        if has_hooks(called):
            raise Unusable("its forward hooks would be lost")
        if parametrize.is_parametrized(called):
            raise Unusable("its weight is computed by a parametrization")
        if len(node.args) + len(node.kwargs) != 1:
            raise Unusable("it is called with more than its input")
        if self.per_sample and owner != _LINEAR:
            raise Unusable("masks for each sample are for linear layers only")
        if self.per_sample and shapes.rank(value) == 1:
            raise Unusable("its input has no batch axis")
        weights = {id(parameter) for parameter in called.parameters(recurse=False)}
        for other in node.graph.nodes:
            if other.op == "get_attr" and INSERTED_DROP not in other.meta:
                prefix, _, name = str(other.target).rpartition(".")
                if id(getattr(module.get_submodule(prefix), name, None)) in weights:
                    raise Unusable("its parameters are read by something else too")
        return 0

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Open the calls."""
        named = [{node.name: node for node in graph.nodes} for graph in graphs(module)]
        for step in plan.steps:
            node = named[step.graph][step.node]
            place_layer(module, step.path, self.layer(0), module_path(node))
            with node.graph.inserting_before(node):
                self._open(module, node, step.path)

    def _open(self, module: fx.GraphModule, node: fx.Node, path: str) -> None:
        """Turn the call of a layer into a call of its function, on a weight that is dropped."""
        layer: Any = called_module(module, node)
        target = str(node.target)
        keyword = not node.args
        (x,) = (*node.args, *node.kwargs.values())
        weight = _read(node, f"{target}.weight")
        bias = None if layer.bias is None else _read(node, f"{target}.bias")
        operands = (weight, x) if self.per_sample else (weight,)
        call = node.graph.call_module(path, operands)
        mark(call, node, weight)
        owner = forward_owner(layer)
        rest: tuple[Any, ...] = ()
        if owner == _LINEAR:
            function: Callable[..., Any] = linear if self.per_sample else F.linear
        elif owner in _TRANSPOSED:
            function = _TRANSPOSED[owner]
            rest = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        else:
            function = _CONVS[owner]
            padding = layer.padding
            if layer.padding_mode != "zeros":
                sizes = tuple(layer._reversed_padding_repeated_twice)
                x = node.graph.call_function(F.pad, (x, sizes, layer.padding_mode))
                place_like(x, node)
                x.meta[INSERTED_DROP] = ("operand",)
                padding = (0,) * len(layer.stride)
            rest = (layer.stride, padding, layer.dilation, layer.groups)
        # The node itself, so that its name and its readers stay.
        node.op, node.target = "call_function", function
        node.args, node.kwargs = (x, call, bias, *rest), {}
        node.meta[INSERTED_DROP] = ("rewritten", target, keyword)


def _read(node: fx.Node, target: str) -> fx.Node:
    """Return the node that reads a parameter, which another call of the layer may have made."""
    for other in node.graph.nodes:
        if other is node:
            break
        if other.op == "get_attr" and other.target == target:
            return other
    made = node.graph.get_attr(target)
    place_like(made, node)
    made.meta[INSERTED_DROP] = ("operand",)
    return made
