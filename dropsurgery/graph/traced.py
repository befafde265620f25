"""The class of a traced network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import fx, nn
from torch.fx.graph import PythonCode

from dropsurgery.graph.drops import INSERTED_DROP
from dropsurgery.graph.lower import compile_graph, lower
from dropsurgery.graph.marks import MARKS
from dropsurgery.graph.module import INSERTED, NATIVE

# Under this key fx finds attributes that a deep copy of a GraphModule keeps.
_KEPT_BY_DEEPCOPY = "_user_preserved_attributes"


class TracedModule(fx.GraphModule):
    """A GraphModule that keeps what the root's own class said about modes and state dicts.

    A graph module is no instance of the network's class. Two things of that class matter all the
    same: a `train` of its own (the usual way to keep BatchNorm frozen), and the version of its
    state dict, on which loading code branches.
    """

    _original_class: type[nn.Module] | None = None

    def remember(self, original: type[nn.Module]) -> None:
        """Keep `train` and the state-dict version of `original`, in deep copies too."""
        kept = {"_original_class": original, "_version": original._version}
        self.__dict__.update(kept)
        self.meta[_KEPT_BY_DEEPCOPY] = kept

    @property
    def _itself(self) -> Self:
        return self

    def recompile(self) -> PythonCode:
        """Compile the graph as it stands, then what runs in its place; see `graph/lower.py`."""
        code = super().recompile()
        lowered = lower(self, self._graph)
        self.__dict__["_runs"] = ""
        if lowered is not None:
            type(self).forward, self.__dict__["_runs"] = compile_graph(lowered)
        return code

    @property
    def running_code(self) -> str:
        """The Python code that a call runs: `code`, unless dropped work is left out."""
        return str(self._runs or self.code)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of every submodule, as the network's own `train` does it."""
        original = self._original_class
        if original is None or original.train is nn.Module.train:
            return super().train(mode)
        # The original's method, and `super()` inside it, want an instance of the original's class:
        # one that is this module in all but class.
        shadow = object.__new__(original)
        shadow.__dict__ = self.__dict__
        original.train(shadow, mode)
        return self

    def __reduce__(self) -> Any:
        """Pickle as fx does, by code, and with the marks on the nodes that code does not carry."""
        build, arguments = super().__reduce__()
        marks = [
            (node.op, {key: value for key, value in node.meta.items() if key in _PICKLED})
            for node in self.graph.nodes
        ]
        return _unpickle, (build, arguments, type(self).__name__, self.meta, marks)


# What a pickle keeps of node.meta: plain data.
_PICKLED = frozenset({"nn_module_stack", INSERTED, NATIVE, INSERTED_DROP, *MARKS})


def _unpickle(
    build: Callable[..., fx.GraphModule],
    arguments: tuple[Any, ...],
    name: str,
    record: dict[str, Any],
    marks: list[tuple[str, dict[str, Any]]],
) -> TracedModule:
    """Make a traced module of what fx makes of a pickle, and mark its nodes."""
    plain = build(*arguments)
    module = TracedModule(nn.Module(), fx.Graph(), name)
    for key, value in plain.__dict__.items():
        if key not in ("_graph", "_code"):
            module.__dict__[key] = value
    module.meta = record
    module.graph = plain.graph
    for node, (op, meta) in zip(module.graph.nodes, marks, strict=True):
        assert node.op == op
        node.meta.update(meta)
    module.recompile()  # what runs depends on the marks
    return module
