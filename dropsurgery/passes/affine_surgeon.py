"""Carrying out where each affine map goes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropsurgery.errors import PassError
from dropsurgery.graph.affine import NORM_LAYERS, Refused, norm_function
from dropsurgery.graph.clone import clone_structure
from dropsurgery.graph.dense import make_plain
from dropsurgery.graph.ledger import LayerState, Ledger, MapState, Move
from dropsurgery.graph.stored import Table
from dropsurgery.layers.channel import ChannelScale, ChannelShift
from dropsurgery.passes.affine_steps import Rewrite, Write
from dropsurgery.passes.weight_edit import WeightEditor


class Surgeon(WeightEditor):
    """Carries moves out on a module: first in the books, then weight by weight."""

    def run(self, steps: Iterable[Any]) -> None:
        """Carry the steps of a plan out, in their order."""
        modules = dict(self.module.named_modules(remove_duplicate=False))
        ledger = Ledger(self.module, self.nodes, modules)
        for step in steps:
            if isinstance(step, Move):
                self.move(ledger, step)
            elif isinstance(step, Write):
                self.write(ledger, step)
            else:
                self.rewrite(ledger, step)

    def move(self, ledger: Ledger, step: Move) -> None:
        """Enter a move in the books."""
        try:
            ledger.read(step.source)
            ledger.apply(step)
        except Refused as refused:
            raise PassError(
                f"a node that FoldAffine is to fold cannot be: {refused}",
                where=f"node '{step.source}'",
                fix="the network that the surgery was saved from, in eval mode",
            ) from None

    def write(self, ledger: Ledger, step: Write) -> None:
        """Write one set of weights."""
        state, node = ledger.layers[step.nodes[0]], self.nodes[step.nodes[0]]
        if isinstance(state.carrier, Table):
            self.put_table(node, state.carrier, state.table(), step.copy_to)
        else:
            weight, bias = state.absorbed()
            keeps = step.adds or state.carrier.bias is not None
            self.put_weights(node, state.carrier, weight, bias if keeps else None, step.copy_to)
        if step.border:
            self.add_border(node, state, step)
        for name in step.nodes:
            if step.copy_to and state.carrier.module is not None:
                self.retarget(self.nodes[name], step.copy_to)

    def add_border(self, node: fx.Node, state: LayerState, step: Write) -> None:
        """Add the map of a convolution's borders behind it."""
        kept = state.carrier.weight
        values = state.border_map(node, step.size).to(kept.dtype).requires_grad_(kept.requires_grad)
        self.add(step.border, ChannelShift(values))
        users = list(node.users)
        with self.graph.inserting_after(node):
            new = self.graph.call_module(step.border, (node,))
        self.place(new, node)
        for user in users:
            user.replace_input_with(node, new)

    def rewrite(self, ledger: Ledger, step: Rewrite) -> None:
        """Put what is left of a map in its place."""
        node = self.nodes[step.node]
        if step.how == "identity":
            self.bypass(node)
            return
        state = ledger.maps[step.node]
        if step.how == "gone":
            for name in step.fresh:
                make_plain(self.nodes[name], ledger.called(self.nodes[name]))
            self.take_map_out(node, self.data(node, state), state.read.tail, dense=step.dense)
            return
        if step.how == "norm":
            self.add(step.path, _norm(node, ledger.called(node), state, step.ones))
        else:
            affine = state.affine
            values = affine.scale if step.how == "scale" else affine.shift
            single = state.axis is None and len(values) == 1
            values = values.reshape(()) if single else values.view((-1,) + (1,) * step.ones)
            like = _parameter_of(state)
            values = values.to(device=like.device, dtype=getattr(torch, step.dtype))
            values.requires_grad_(like.requires_grad)
            layer = ChannelScale(values) if step.how == "scale" else ChannelShift(values)
            self.add(step.path, self.with_tail(node, layer, state.read.tail))
        with self.graph.inserting_before(node):
            new = self.graph.call_module(step.path, (self.data(node, state),))
        self.place(new, node)
        self.take_map_out(node, new, (), dense=False)

    def data(self, node: fx.Node, state: MapState) -> fx.Node:
        """Return what a map reads now."""
        inputs = [*node.all_input_nodes]
        found = state.read.data if state.read.data in inputs else None
        return found if found is not None else next(n for n in inputs if n.op != "get_attr")

    def with_tail(self, node: fx.Node, layer: nn.Module, tail: tuple[str, ...]) -> nn.Module:
        """Return a layer with what ran behind the map in one module, so that it stays one node."""
        if not tail:
            return layer
        parts = {name: self.module.get_submodule(f"{node.target}.{name}") for name in tail}
        whole = nn.Sequential(OrderedDict({"map": layer, **parts}))
        whole.training = False
        return whole

    def add(self, path: str, layer: nn.Module) -> None:
        """Put a new module at a path."""
        layer.training = False
        self.module.add_submodule(path, layer)


def _parameter_of(state: MapState) -> Tensor:
    norm = state.read.norm
    if norm is None:
        return torch.empty(0)
    tensors = (norm.weight, norm.bias, *norm.tensors)
    return next(tensor for tensor in tensors if tensor is not None)


def _norm(node: fx.Node, called: nn.Module | None, state: MapState, spatial: int) -> nn.Module:
    """Return a BatchNorm with its statistics, and weight and bias for another map.

    s = weight/√(var + eps) and t = bias - mean·s. A function of given statistics becomes a layer,
    for an input with `spatial` axes behind the channels'.
    """
    norm = state.read.norm
    assert norm is not None
    layer: Any
    if called is not None and norm_function(node, called) is None:
        layer = clone_structure(called)
    else:
        layer = NORM_LAYERS[spatial + 2](len(norm.mean), norm.eps, device="meta")
        mean, var = norm.mean.detach(), norm.var.detach()
        count = torch.zeros((), dtype=torch.long, device=mean.device)
        layer._buffers |= {"running_mean": mean, "running_var": var, "num_batches_tracked": count}
        layer.training = False
    dtype = norm.mean.dtype
    weight = state.affine.scale * (norm.var.detach().double() + norm.eps).sqrt()
    bias = state.affine.shift + norm.mean.detach().double() * state.affine.scale
    for name, value, old in (("weight", weight, norm.weight), ("bias", bias, norm.bias)):
        if name in layer._buffers:
            layer._buffers[name] = value.to(dtype)
        else:
            trained = old is not None and old.requires_grad
            layer.register_parameter(name, nn.Parameter(value.to(dtype), trained))
    layer.affine = True
    return layer
