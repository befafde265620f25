"""What insertions put into a network, taken out again."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from torch import fx

from dropsurgery.errors import ArgumentTypeError, PassError
from dropsurgery.graph.drops import INSERTED_DROP
from dropsurgery.graph.module import graphs, module_path, nodes_by_target
from dropsurgery.passes.base import Change, Pass, Plan


@dataclass(frozen=True)
class RemoveDrops(Pass):
    """Undo insertions: the graph is, as code and as numbers, what it was before.

    It undoes `InsertDropout`, `InsertDropBlock`, `InsertDropConnect`, `InsertCutout` and
    `InsertWeightedChannelDropout`. `RemoveDropPath` undoes `InsertDropPath`, and drops that were in
    the network before are left as they are (`ConvertDropout("identity")` takes every drop out).

    Args:
        where: which of the inserted layers: a pattern for their path (`"layer4.*"`, as in
            `fnmatch`), or a tuple of such; all of them without.

    Raises:
        PassError: `where` matches no inserted layer.
    """

    where: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.where, list):
            object.__setattr__(self, "where", tuple(self.where))
        named = self.where if isinstance(self.where, tuple) else ()
        fits = self.where is None or isinstance(self.where, str | tuple)
        if not fits or not all(isinstance(name, str) for name in named):
            raise ArgumentTypeError(
                f"where is a pattern for paths, or several, got {self.where!r}", fix="'layer4.*'"
            )

    def plan(self, module: fx.GraphModule) -> Plan:
        """List the calls that were inserted."""
        changes, steps, paths = [], [], set[str]()
        for index, graph in enumerate(graphs(module)):
            for node in graph.nodes:
                if _is_left_open(node) and self._chosen(node.meta[INSERTED_DROP][1]):
                    steps.append((index, node.name))
                if node.meta.get(INSERTED_DROP) != ("call",):
                    continue
                path = str(node.target)
                paths.add(path)
                if self._chosen(path):
                    steps.append((index, node.name))
                    if index == 0:
                        changes.append(Change(module_path(node), node.name, f"took out '{path}'"))
        if self.where is not None and not steps:
            raise PassError(
                f"where={self.where!r} matches none of the {len(paths)} inserted layers",
                where=", ".join(sorted(paths)[:8]) or None,
                fix="the path of an inserted layer, or a pattern for it",
            )
        return Plan(tuple(changes), steps=tuple(steps))

    def _chosen(self, path: str) -> bool:
        patterns = (self.where,) if isinstance(self.where, str) else self.where
        return patterns is None or any(fnmatch.fnmatchcase(path, p) for p in patterns)

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Take out the calls, then what only they needed."""
        left: set[str] = set()
        for index, name in plan.steps:
            graph = graphs(module)[index]
            node = next(n for n in graph.nodes if n.name == name)
            if _is_left_open(node):
                _close(node)
                continue
            left.add(str(node.target))
            for user in list(node.users):
                if user.meta.get(INSERTED_DROP, ("",))[0] == "rewritten":
                    _close(user)
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        for graph in graphs(module):
            for node in reversed(list(graph.nodes)):
                if node.meta.get(INSERTED_DROP) == ("operand",) and not node.users:
                    graph.erase_node(node)
        for path in left - nodes_by_target(module).keys():
            module.delete_submodule(path)


def _is_left_open(node: fx.Node) -> bool:
    """Say whether a layer's call was opened for a drop that another pass has taken out."""
    done = node.meta.get(INSERTED_DROP, ("",))
    weight = node.args[1] if done[0] == "rewritten" else None
    return isinstance(weight, fx.Node) and weight.target == f"{done[1]}.weight"


def _close(node: fx.Node) -> None:
    """Make a function call on a dropped weight the call of the layer that it was."""
    _, path, keyword = node.meta.pop(INSERTED_DROP)
    node.meta.pop("is_wrapped", None)
    x = node.args[0]
    if isinstance(x, fx.Node) and x.meta.get(INSERTED_DROP) == ("operand",):
        x = x.args[0]  # the padding
    node.op, node.target = "call_module", path
    node.args, node.kwargs = ((), {"input": x}) if keyword else ((x,), {})
