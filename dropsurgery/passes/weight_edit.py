"""Giving layers new weights, and taking affine maps out of a graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn

from dropsurgery.graph.affine import identity_input
from dropsurgery.graph.clone import clone_structure
from dropsurgery.graph.module import fresh_path
from dropsurgery.graph.stored import Product, Table
from dropsurgery.graph.weighted import Weighted
from dropsurgery.passes.edit import Editor


class WeightEditor(Editor):
    """What passes that fold maps into weights share."""

    def put_weights(
        self, node: fx.Node, old: Weighted, weight: Tensor, bias: Tensor | None, copy_to: str = ""
    ) -> None:
        """Give a layer new weights, or make a copy of it that has them.

        Args:
            node: a call of the layer.
            old: the layer as it was.
            weight: its new weight.
            bias: its new bias; None where it has none, and needs none.
            copy_to: path of the copy; for a product with a stored matrix, of the linear layer
                that it becomes, which has a place for the bias.
        """
        if isinstance(old, Product):
            self._set_matrix(node, old, weight, bias, copy_to)
            return
        if old.module is None:
            self._set_operands(node, old, weight, bias)
            return
        layer = old.module
        if copy_to:
            layer = clone_structure(layer)
            self.module.add_submodule(copy_to, layer)
        layer.weight = nn.Parameter(weight, old.weight.requires_grad)
        kept = old.weight if old.bias is None else old.bias
        if bias is not None:
            layer.bias = nn.Parameter(bias, kept.requires_grad)

    def put_table(self, node: fx.Node, old: Table, values: Tensor, copy_to: str = "") -> None:
        """Give a stored tensor or an embedding new values, or make a copy that has them."""
        if old.module is None:
            self.assign(str(node.target), values, old.weight)
            return
        layer: Any = old.module
        if copy_to:
            layer = clone_structure(layer)
            self.module.add_submodule(copy_to, layer)
        layer.weight = nn.Parameter(values, old.weight.requires_grad)

    def bypass(self, node: fx.Node) -> None:
        """Take out a node that returns its input as it is."""
        data = identity_input(node, self.called(node))
        assert data is not None
        node.replace_all_uses_with(data)
        self.erase(node)

    def take_map_out(
        self, node: fx.Node, value: fx.Node, tail: Iterable[str], *, dense: bool
    ) -> None:
        """Put a value in a map's place; what a BatchNorm runs on the normalised value stays.

        Args:
            node: the map.
            value: the value.
            tail: names of the map's submodules that stay.
            dense: whether the value has to be made contiguous, as a BatchNorm's output is.
        """
        with self.graph.inserting_before(node):
            if dense:
                value = self.graph.call_method("contiguous", (value,))
                self.place(value, node)
            for child in tail:
                value = self.graph.call_module(f"{node.target}.{child}", (value,))
                self.place(value, node)
        node.replace_all_uses_with(value)
        self.erase(node)

    def _set_matrix(
        self, node: fx.Node, old: Product, weight: Tensor, bias: Tensor | None, path: str
    ) -> None:
        """Give a product another matrix, or make it the linear layer at `path`, with a bias."""
        operand = old.operands[0]
        assert operand is not None
        if not path:
            self.assign(str(operand.target), weight, old.weight)
            return
        inputs, outputs = weight.shape
        layer = nn.Linear(inputs, outputs, device="meta")
        trains = old.weight.requires_grad
        layer.weight = nn.Parameter(weight.t().contiguous(), trains)
        assert bias is not None
        layer.bias = nn.Parameter(bias, trains)
        self.module.add_submodule(path, layer.train(False))
        with self.graph.inserting_before(node):
            new = self.graph.call_module(path, (node.all_input_nodes[0],))
        self.place(new, node)
        node.replace_all_uses_with(new)
        self.erase(node)

    def _set_operands(
        self, node: fx.Node, old: Weighted, weight: Tensor, bias: Tensor | None
    ) -> None:
        """Give a functional layer new weights."""
        weight_node, bias_node = old.operands
        assert weight_node is not None
        target = str(weight_node.target)
        self.assign(target, weight, old.weight)
        if bias is None:
            return
        if bias_node is not None:
            assert old.bias is not None
            self.assign(str(bias_node.target), bias, old.bias)
            return
        prefix, _, name = target.rpartition(".")
        owner = self.module.get_submodule(prefix)
        path = fresh_path(owner, prefix, f"{name}_bias")
        self.assign(path, bias, old.weight)
        with self.graph.inserting_before(node):
            new = self.graph.get_attr(path)
        self.place(new, node)
        if len(node.args) > 2:
            node.update_arg(2, new)
        else:
            node.update_kwarg("bias", new)
