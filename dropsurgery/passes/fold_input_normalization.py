"""Normalisation of a network's input, into its first layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from dropsurgery.errors import ArgumentError, PassError
from dropsurgery.graph.affine import Affine, Refused
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.linear import Linear
from dropsurgery.graph.module import fresh_path, place_like
from dropsurgery.graph.pieces import Layer
from dropsurgery.graph.rounding import round_rows
from dropsurgery.graph.stencil import Kernel, Stencil
from dropsurgery.graph.trace import keep_eval
from dropsurgery.graph.two_mode import TwoModeGraphModule
from dropsurgery.graph.uses import Uses, value_readers
from dropsurgery.passes.base import Change, Pass, Plan


@dataclass(frozen=True)
class FoldInputNormalization(Pass):
    """Let the network take raw inputs: f'(x) = f((x / scale - mean) / std).

    With s = 1/(scale·std) and t = -mean/std, a first layer W·(s·x + t) + b has the weights W·s over
    its input channels and the bias b + Σ W·t. What of that is exact depends on what reads the
    input, and `result.changes` says which it was:

    - only convolutions that do not pad, or that pad by reflection, replication or wrapping, and
      linear layers: all of it is folded, and nothing is left to compute;
    - convolutions that pad with zeros, which stand for the mean of the raw input: the scale is
      folded, and x - scale·mean is left as the first operation, so that zeros stay zeros;
    - anything else, or a first layer that is used elsewhere, too: s·x + t is the first operation.

    The arithmetic is float64 and is rounded once. The result is an inference graph; a network whose
    forward differs between the modes keeps its eval graph only.

    Args:
        mean: mean of each channel, of inputs in [0, 1].
        std: standard deviation of each channel, likewise; above 0.
        scale: what a raw input of 1 is in the unit of the new inputs: 255 for bytes (as floating
            numbers from 0 to 255), 1 for inputs in [0, 1].
        input: name of the input; None for the first.

    Raises:
        ArgumentError: `mean` and `std` differ in length, or are not finite, or `std` or `scale` is
            not above 0.
        PassError: there is no such input, or its first layer has another number of channels.
    """

    keeps_state_dict_keys: ClassVar[bool] = False
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0
    input: str | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            given: Any = getattr(self, name)
            values = given.tolist() if isinstance(given, Tensor) else given
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise ArgumentError(f"{name} is {given!r}", fix="one number for each channel")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if len(self.mean) != len(self.std):
            raise ArgumentError(f"mean has {len(self.mean)} channels and std {len(self.std)}")
        if not all(map(math.isfinite, (*self.mean, *self.std, self.scale))):
            raise ArgumentError("mean, std or scale is not finite")
        if min(*self.std, self.scale) <= 0.0:
            raise ArgumentError(f"std is {self.std} and scale {self.scale}", fix="above 0")

    def plan(self, module: fx.GraphModule) -> Plan:
        """Return how much of the normalisation the first layers can take."""
        node = self._placeholder(module)
        layers, refused = self._layers(module, node)
        names = ", ".join(repr(str(layer.target)) for layer in layers)
        kept, what = "all", f"(x / {self.scale:g} - mean) / std is the first operation: {refused}"
        if not refused:
            try:
                for layer in layers:
                    self._kernel(module, layer, shift=True)
                kept, what = "nothing", f"mean and std folded into {names}"
            except Refused:
                kept = "shift"
                what = (
                    f"std folded into {names}; x - {self.scale:g}·mean is the first operation, as "
                    "what is padded with zeros must stay zero"
                )
        change = Change("", node.name, f"normalisation of '{node.name}': {what}")
        changes = [change]
        if isinstance(module, TwoModeGraphModule):
            changes.append(
                Change("", "", "the training graph was dropped: this is an inference graph")
            )
        return Plan(tuple(changes), steps=(kept, *(layer.name for layer in layers)))

    def _placeholder(self, module: fx.GraphModule) -> fx.Node:
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        chosen = [node for node in inputs if self.input in (None, node.name, str(node.target))]
        if not chosen:
            raise PassError(
                f"there is no input {self.input!r}",
                fix=", ".join(repr(str(node.target)) for node in inputs) or "a network with inputs",
            )
        return chosen[0]

    def _layers(self, module: fx.GraphModule, source: fx.Node) -> tuple[list[fx.Node], str]:
        """Return the layers that read the input, and why they cannot take anything in, or ""."""
        modules = dict(module.named_modules(remove_duplicate=False))
        uses = Uses(module, module.graph, modules)
        linear = Linear(module, modules, Shapes(module, module.graph, modules))
        found: list[fx.Node] = []
        refused = "" if value_readers(source) else "nothing reads the input"
        for node in value_readers(source):
            piece = linear.piece(node)
            if not isinstance(piece, Layer) or piece.weighted is None or piece.data is not source:
                refused = refused or f"'{node.name}' reads the input, too"
                continue
            weighted, called = piece.weighted, linear.called(node)
            channels = weighted.weight.shape[1] * weighted.groups
            if channels != len(self.mean):
                raise PassError(
                    f"mean and std have {len(self.mean)} channels, and {weighted.label}, which "
                    f"reads the input, takes {channels}",
                )
            others = [r for tensor in weighted.tensors for r in uses.readers(tensor)]
            alone = called is not None and uses.calls(called) == [node] and not others
            if not alone or uses.is_within(called or module):
                refused = refused or f"{weighted.label} is used elsewhere, too"
            found.append(node)
        if not refused:
            refused = self._loses_precision(module, found)
        return found if not refused else [], refused

    def _loses_precision(self, module: fx.GraphModule, layers: list[fx.Node]) -> str:
        for node in layers:
            kernel = self._kernel(module, node, shift=False)
            dtype = _weighted(module, node).weight.dtype
            peak = kernel.weight.abs().max()
            if not bool(peak.to(dtype).isfinite()) or float(peak) < torch.finfo(dtype).tiny:
                return f"the folded weights of '{node.target}' cannot be held in {dtype}"
        return ""

    def _affine(self, *, shift: bool) -> Affine:
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (self.mean, self.std))
        return Affine(1.0 / (self.scale * std), -mean / std if shift else torch.zeros_like(mean))

    def _kernel(self, module: fx.GraphModule, node: fx.Node, *, shift: bool) -> Kernel:
        """Return what a layer is of the raw input (with its mean taken off, without `shift`)."""
        piece = _layer(module, node)
        outer = piece.kernel(len(piece.axes), len(self.mean))
        affine, weight = self._affine(shift=shift), outer.weight
        scale, offset = affine.scale.to(weight.device), affine.shift.to(weight.device)
        form = Stencil.identity(len(piece.axes), len(self.mean))
        gain = Kernel(
            form.shifted() if shift and bool(offset.any()) else form,
            scale.view(-1, *(1,) * (weight.ndim - 1)),
            offset,
        )
        return outer.behind(gain)

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Fold what can be, and put what is left before the first layers."""
        kept, *names = plan.steps
        source = self._placeholder(module)
        nodes = {node.name: node for node in module.graph.nodes}
        readers = value_readers(source)
        axes = 2
        for name in names:
            kernel = self._kernel(module, nodes[name], shift=kept == "nothing")
            layer: Any = module.get_submodule(str(nodes[name].target))
            old, axes = layer.weight, len(kernel.form.axes)
            weight = round_rows(kernel.weight.view(old.shape), old.dtype)
            layer.weight = nn.Parameter(torch.empty_like(old).copy_(weight), old.requires_grad)
            if kernel.form.shifts:
                layer.bias = nn.Parameter(kernel.bias.to(old.dtype), old.requires_grad)
        if kept != "nothing":
            self._insert(module, source, readers, axes, whole=kept == "all")
        if isinstance(module, TwoModeGraphModule):
            keep_eval(module)

    def _insert(
        self, module: fx.GraphModule, source: fx.Node, readers: list[fx.Node], axes: int,
        *, whole: bool,
    ) -> None:  # fmt: skip
        """Put x - scale·mean, and where it is `whole` the factor, behind the input."""
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
        shape = (-1, *(1,) * axes)
        mean = torch.tensor(self.mean, dtype=torch.float64) * self.scale
        values = {"input_mean": mean, "input_scale": self._affine(shift=True).scale}
        value = source
        for name in ("input_mean", "input_scale") if whole else ("input_mean",):
            path = fresh_path(module, "", name)
            module.register_buffer(path, values[name].view(shape).to(like))
            with module.graph.inserting_after(
                value if value is not source else _last_input(module)
            ):
                operand = module.graph.get_attr(path)
            with module.graph.inserting_after(operand):
                method = "sub" if name == "input_mean" else "mul"
                new = module.graph.call_method(method, (value, operand))
            for node in (operand, new):
                place_like(node, source)
            if "tensor_meta" in source.meta:
                new.meta["tensor_meta"] = source.meta["tensor_meta"]
            value = new
        for reader in readers:
            reader.replace_input_with(source, value)

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return the parameters as JSON."""
        return {"pass": self.name, "mean": list(self.mean), "std": list(self.std),
                "scale": self.scale, "input": self.input}  # fmt: skip


def _layer(module: fx.GraphModule, node: fx.Node) -> Layer:
    modules = dict(module.named_modules(remove_duplicate=False))
    piece = Linear(module, modules, Shapes(module, module.graph, modules)).piece(node)
    assert isinstance(piece, Layer)
    return piece


def _weighted(module: fx.GraphModule, node: fx.Node) -> Any:
    return _layer(module, node).weighted


def _last_input(module: fx.GraphModule) -> fx.Node:
    return [node for node in module.graph.nodes if node.op == "placeholder"][-1]
