"""Editing a traced module: what passes that remove layers share."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, fx, nn

from dropsurgery.graph.affine import fetch
from dropsurgery.graph.module import place_like
from dropsurgery.graph.uses import Uses


class Editor:
    """Edits the (eval) graph of a module, and remembers what that left without use.

    Args:
        module: the module, which belongs to the editor's caller.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self.nodes = {node.name: node for node in module.graph.nodes}
        self.loose_modules: dict[int, nn.Module] = {}
        self.loose_tensors: list[str] = []

    def called(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, else None."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def place(self, new: fx.Node, old: fx.Node) -> None:
        """Give a node the place, and unless it is an operand the shape, of the one it replaces."""
        place_like(new, old)
        if new.op != "get_attr" and "tensor_meta" in old.meta:
            new.meta["tensor_meta"] = old.meta["tensor_meta"]

    def erase(self, node: fx.Node) -> None:
        """Erase a node and the reads that only it needed."""
        called = self.called(node)
        if called is not None:
            self.loose_modules[id(called)] = called
        reads = [operand for operand in node.all_input_nodes if operand.op == "get_attr"]
        self.graph.erase_node(node)
        for operand in reads:
            if not operand.users:
                self.loose_tensors.append(str(operand.target))
                self.graph.erase_node(operand)

    def retarget(self, node: fx.Node, path: str) -> None:
        """Let a call use another module."""
        with self.graph.inserting_before(node):
            new = self.graph.call_module(path, node.args, node.kwargs)
        self.place(new, node)
        node.replace_all_uses_with(new)
        self.erase(node)

    def assign(self, target: str, value: Tensor, like: Tensor) -> None:
        """Put a tensor at a path, as a parameter or a buffer like another one."""
        prefix, _, name = target.rpartition(".")
        owner = self.module.get_submodule(prefix)
        if isinstance(like, nn.Parameter):
            setattr(owner, name, nn.Parameter(value, like.requires_grad))
        elif name in owner._buffers:
            owner._buffers[name] = value
        else:
            owner.register_buffer(name, value)

    def clear(self) -> None:
        """Take modules and tensors out that the edits left without use."""
        modules = dict(self.module.named_modules(remove_duplicate=False))
        uses = Uses(self.module, self.graph, modules)
        for target in dict.fromkeys(self.loose_tensors):
            prefix, _, name = target.rpartition(".")
            owner = modules[prefix]
            if uses.is_run(owner) or uses.readers(fetch(self.module, target)):
                continue
            if isinstance(owner, nn.modules.batchnorm._NormBase):
                self.loose_modules[id(owner)] = owner
            else:
                delattr(owner, name)
        for path, module in modules.items():
            if id(module) in self.loose_modules and not uses.is_needed(module):
                prefix, _, name = path.rpartition(".")
                self.take_out(modules[prefix], name, module, uses)

    def take_out(self, parent: nn.Module, name: str, module: nn.Module, uses: Uses) -> None:
        """Remove a module, or leave a container in its place where its children are used."""
        siblings = parent._modules
        if siblings.get(name) is not module:
            return  # the parent stands at several paths, and was visited
        used = [(key, child) for key, child in module.named_children() if uses.is_needed(child)]
        if used:
            container = nn.Sequential(OrderedDict(used))
            container.training = module.training
            siblings[name] = container
        else:
            del siblings[name]
