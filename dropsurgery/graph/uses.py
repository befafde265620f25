"""Who uses a module and who uses a tensor: a node's users alone do not tell."""

from __future__ import annotations

import builtins
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from dropsurgery.graph.affine import fetch

_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda"})
# Methods that ask their second operand for its shape or dtype only.
_LIKE_METHODS = frozenset({"view_as", "reshape_as", "expand_as", "type_as"})
_METHODS = frozenset({"size", "dim", "ndimension", "numel", "get_device", "is_floating_point"})


def value_readers(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node that read its values, not only its shape, dtype or device."""
    return [user for user in node.users if not _asks_for_form(user, node)]


def _asks_for_form(user: fx.Node, node: fx.Node) -> bool:
    if user.op == "call_method":
        like = user.target in _LIKE_METHODS and user.args[0] is not node
        return like or user.target in _METHODS
    if user.op != "call_function":
        return False
    if user.target is builtins.getattr:
        return user.args[1] in _ATTRIBUTES
    return user.target in (torch.numel, torch.is_floating_point)


class Uses:
    """Users of module objects and of tensors in one graph.

    One module object may stand at several paths and be called at several places; one parameter may
    belong to several modules, and be read by itself. Everything here goes by object, not by path.

    Args:
        root: the module whose paths the graph's nodes name.
        graph: the graph that counts (of a two-mode network, the one that will be kept).
        modules: the modules of `root` by path.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
        self._calls: dict[int, list[fx.Node]] = {}
        self._within: set[int] = set()
        self._readers: dict[int, list[fx.Node]] = {}
        self._holders: dict[int, list[str]] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                self._add_call(node, modules[str(node.target)])
            elif node.op == "get_attr":
                readers = self._readers.setdefault(id(fetch(root, str(node.target))), [])
                readers += [user for user in node.users if user not in readers]
        for path, module in modules.items():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._holders.setdefault(id(parameter), []).append(path)

    def _add_call(self, node: fx.Node, module: nn.Module) -> None:
        if id(module) not in self._calls:
            inside = {id(child) for child in module.modules()}
            self._within |= inside - {id(module)}
        self._calls.setdefault(id(module), []).append(node)

    def calls(self, module: nn.Module) -> list[fx.Node]:
        """Return the nodes that call this module object, at whatever path."""
        return self._calls.get(id(module), [])

    def is_within(self, module: nn.Module) -> bool:
        """Say whether a module that the graph calls holds this one, and may run it."""
        return id(module) in self._within

    def is_run(self, module: nn.Module) -> bool:
        """Say whether this module is called, by the graph or inside a module that is."""
        return bool(self.calls(module)) or self.is_within(module)

    def readers(self, tensor: Tensor) -> list[fx.Node]:
        """Return the nodes that read a parameter or buffer by itself."""
        return self._readers.get(id(tensor), [])

    def holders(self, tensor: Tensor) -> list[str]:
        """Return the paths of the modules that have this parameter."""
        return self._holders.get(id(tensor), [])

    def is_needed(self, module: nn.Module) -> bool:
        """Say whether this module, or a tensor of its own, is used (its children aside)."""
        own = (*module._parameters.values(), *module._buffers.values())
        return self.is_run(module) or any(t is not None and self.readers(t) for t in own)
