"""From a network in two modes to its inference graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dropsurgery.graph.module import module_path
from dropsurgery.graph.trace import keep_eval
from dropsurgery.graph.two_mode import TwoModeGraphModule
from dropsurgery.layers.functions import FollowTraining
from dropsurgery.passes.base import Change, Pass, Plan


@dataclass(frozen=True)
class KeepEval(Pass):
    """Keep only what runs in eval mode, and put the network into it.

    Of a network with two graphs the training graph goes; functions that were given the training
    flag are called with it off.
    """

    def plan(self, module: fx.GraphModule) -> Plan:
        """List the training graph and the calls that follow the mode."""
        changes = []
        if isinstance(module, TwoModeGraphModule):
            changes.append(Change("", "", "kept the eval graph, without the training graph"))
        for node in module.graph.nodes:
            if node.op == "call_module":
                layer = module.get_submodule(str(node.target))
                if isinstance(layer, FollowTraining):
                    what = f"fixed {layer.argument}=False of '{node.target}'"
                    changes.append(Change(module_path(node), node.name, what))
        return Plan(tuple(changes))

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Drop the training graph, if there is one."""
        module.eval()
        keep_eval(module)


@dataclass(frozen=True)
class DropUnused(Pass):
    """Leave out submodules that no graph uses, such as auxiliary heads after `KeepEval`."""

    keeps_state_dict_keys: ClassVar[bool] = False

    def plan(self, module: fx.GraphModule) -> Plan:
        """List the outermost modules that nothing uses."""
        used = {""}
        for node in module.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                parts = str(node.target).split(".")
                used |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
                if node.op == "call_module":
                    called = module.get_submodule(str(node.target))
                    used |= {f"{node.target}.{path}" for path, _ in called.named_modules() if path}
        unused = [p for p, _ in module.named_modules(remove_duplicate=False) if p not in used]
        outermost = [p for p in unused if p.rpartition(".")[0] in used]
        changes = (Change(p, "", f"left out '{p}', which eval does not use") for p in outermost)
        return Plan(tuple(changes), steps=tuple(outermost))

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Delete them."""
        for path in plan.steps:
            module.delete_submodule(path)
