"""What computes nothing new, out of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from dropsurgery.errors import PassError
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.constant_subgraphs import ConstantSubgraphs
from dropsurgery.graph.memory import Memory
from dropsurgery.graph.module import Skip, called_module, fresh_path, module_path
from dropsurgery.graph.no_ops import no_op
from dropsurgery.graph.ops import Kind, kind_of
from dropsurgery.graph.purity import is_pure
from dropsurgery.graph.trace import keep_eval
from dropsurgery.graph.two_mode import TwoModeGraphModule
from dropsurgery.passes.base import Change, Pass, Plan
from dropsurgery.passes.edit import Editor


@dataclass(frozen=True)
class Step:
    """One edit.

    Attributes:
        kind: "replace" a node by another, "reread" (let it read another), "splice" (let it join
            what another joins), "erase", or "store" its value as a buffer.
        node: name of the node.
        other: name of the other node, or path of the buffer.
    """

    kind: str
    node: str
    other: str = ""


@dataclass(frozen=True)
class RemoveNoOps(Pass):
    """Take out of the graph what computes nothing new. Values stay as they are, bit for bit.

    - identities (see `dropsurgery.graph.no_ops`): `nn.Identity`, drop layers in eval mode, x·1,
      x + 0, permutations that cancel, casts to the own dtype, pooling over single entries;
    - one reshape behind another: the second alone; a concatenation that only another one reads,
      along the same axis: all of it in one;
    - the same operation of the same operands twice: once;
    - what depends on no input, such as a gather from a table of position biases or standardised
      weights: computed once and kept as a buffer;
    - what nothing reads: auxiliary heads whose result eval mode does not return.

    Only operations that are known to do nothing else are touched: no random draws, no writes in
    place, no assertions, no layers in training mode that draw or keep statistics. A copy is only
    replaced by its original where nothing writes into either afterwards, and where no output would
    come to share memory with an input, a parameter or another output. (x + 0 turns -0 into 0, and
    x does not: equal numbers.) Casts stay where only the network's present dtype makes them no-ops,
    since a slim network may be cast later.

    The result is an inference graph; a network whose forward differs between the modes keeps its
    eval graph only, and is left alone while it is in training mode.

    Args:
        max_constant: how many entries a stored value may have, where it has more than what it was
            computed from.
        steps: the edits to make, as a saved surgery lists them. None makes those that are proved.

    Raises:
        PassError: `steps` names a node that is not there.
    """

    keeps_state_dict_keys: ClassVar[bool] = False
    max_constant: int = 2**20
    steps: tuple[Step, ...] | None = None

    def plan(self, module: fx.GraphModule) -> Plan:
        """Return what can go. All of it is tried on a copy of the graph."""
        if self.steps is not None:
            names = {node.name for node in module.graph.nodes}
            missing = sorted({step.node for step in self.steps} - names)
            if missing:
                raise PassError(
                    f"RemoveNoOps is to take out {', '.join(missing)}, and there is no such node",
                    fix="the network that the surgery was saved from",
                )
            return Plan(steps=self.steps)
        if module.training and isinstance(module, TwoModeGraphModule):
            reason = "the network is in training mode, where its forward is another"
            return Plan(skipped=(Skip("", "", f"{reason}: call .eval() on it first"),))
        trial = _Trial(module, self.max_constant)
        trial.run()
        return Plan(tuple(trial.changes), tuple(trial.skipped.values()), tuple(trial.steps))

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Edit the graph, then take out of the module tree what nothing uses any more."""
        if not plan.steps:
            return
        surgeon = _Surgeon(module)
        for step in plan.steps:
            surgeon.do(step)
        if isinstance(module, TwoModeGraphModule):
            keep_eval(module)
        surgeon.clear()

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return the edits that were made: without example inputs, fewer would be proved."""
        steps = [[step.kind, step.node, step.other] for step in plan.steps]
        return {"pass": self.name, "max_constant": self.max_constant, "steps": steps}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RemoveNoOps:
        """Build the pass again from what `to_json` wrote."""
        steps = tuple(Step(*map(str, step)) for step in data["steps"])
        return cls(int(data["max_constant"]), steps)


class _Trial:
    """Makes the edits on a copy of a graph, and writes them down."""

    def __init__(self, module: fx.GraphModule, max_constant: int) -> None:
        self.module = module
        self.max_constant = max_constant
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        result = self.graph.graph_copy(module.graph, copies)
        self.output = self.graph.output(result)
        self.names = {copy: node.name for node, copy in copies.items()}
        self.steps: list[Step] = []
        self.changes: list[Change] = []
        self.skipped: dict[str, Skip] = {}

    def run(self) -> None:
        """Edit until nothing more can go."""
        count = -1
        while count != len(self.steps):
            count = len(self.steps)
            self.memory = Memory(self.module, self.graph)
            self.shapes = Shapes(self.module, self.graph, self.modules)
            self.first: dict[Any, fx.Node] = {}
            for node in list(self.graph.nodes):
                if node.op not in ("placeholder", "output"):
                    self.visit(node)
            self.sweep()
        self.store_constants()
        self.sweep()
        gone = [step.node for step in self.steps if step.kind == "erase"]
        if gone:
            names = ", ".join(gone[:3]) + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
            self.changes.append(Change("", "", f"nothing reads {names}: erased"))

    def visit(self, node: fx.Node) -> None:
        found = no_op(self.module, self.shapes, node)
        if found is not None:
            reason = self.hazard(node, found.source, node) if found.copies else None
            label = self.label(node)
            if reason is None:
                self.replace(node, found.source, f"{label} {found.what}: removed")
                return
            self.tell(node, f"{label} {found.what}, but {reason}")
        elif self.is_reshape_twice(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            inner = source.args[0]
            assert isinstance(inner, fx.Node)
            if self.hazard(node, inner, node) is None:
                self.step("reread", node, inner, f"reshapes '{self.names[inner]}' at once")
                self.memory.join(node, inner)
                node.update_arg(0, inner)
        elif (joined := self.joined_before(node)) is not None:
            self.step("splice", node, joined, f"joins what '{self.names[joined]}' joined, at once")
            splice(node, joined)
        else:
            self.visit_repeat(node)

    def joined_before(self, node: fx.Node) -> fx.Node | None:
        """Return a concatenation along the same axis that nothing but this one reads."""
        if node.target not in _JOINS or not isinstance(node.args[0], list | tuple):
            return None
        for inner in node.args[0]:
            if (
                isinstance(inner, fx.Node)
                and inner.target in _JOINS
                and isinstance(inner.args[0], list | tuple)
                and _rest(inner) == _rest(node)
                and len(inner.users) == 1
                and list(node.args[0]).count(inner) == 1
                and not any(
                    next(self.memory.written(value, inner, node), None) is not None
                    for value in inner.all_input_nodes
                )
            ):
                return inner
        return None

    def visit_repeat(self, node: fx.Node) -> None:
        """Replace a node by an equal one before it."""
        if node.op == "get_attr" or not is_pure(self.module, node):
            return
        first = self.first.setdefault(self.key(node), node)
        if first is node:
            return
        for value in node.all_input_nodes:
            if next(self.memory.written(value, first, node), None) is not None:
                self.first[self.key(node)] = node
                return
        reason = self.hazard(node, first, first)
        if reason is None:
            self.replace(node, first, f"{self.label(node)} repeats '{self.names[first]}': removed")
        else:
            self.tell(node, f"{self.label(node)} repeats '{self.names[first]}', but {reason}")

    def key(self, node: fx.Node) -> Any:
        """Return what is equal for nodes that compute the same."""
        target: Any = called_module(self.module, node) or node.target
        function = target if node.op == "call_method" else id(target)
        return (node.op, function, _frozen(node.args), _frozen(node.kwargs))

    def hazard(self, node: fx.Node, source: fx.Node, since: fx.Node) -> str | None:
        """Return why a value cannot stand in for one that has memory of its own, or None.

        Args:
            node: the one.
            source: the other.
            since: where the two begin to have equal values.
        """
        memory = self.memory
        if memory.shared(node, source):
            return None
        members = [*memory.group(node), *memory.group(source)]
        for value in members:
            if value in memory.writes and memory.order[value] > memory.order[since]:
                return f"'{self.names[value]}' writes into its memory"
        shown = [value for value in members if self.output in value.users]
        held = [value for value in members if value.op in ("placeholder", "get_attr")]
        if shown and (len(shown) > 1 or held):
            return "an output would share memory with another value that can be written to"
        if source.op == "placeholder" or kind_of(self.module, source) in _VIEWS:
            readers = {user for value in memory.group(node) for user in value.users}
            strict = [user.name for user in readers if user.target in _STRICT]
            if strict:
                return f"'{strict[0]}' may rely on the layout of a copy"
        return None

    def replace(self, node: fx.Node, source: fx.Node, what: str) -> None:
        self.step("replace", node, source, what)
        self.memory.join(node, source)
        node.replace_all_uses_with(source)
        self.graph.erase_node(node)

    def step(self, kind: str, node: fx.Node, other: fx.Node, what: str) -> None:
        self.steps.append(Step(kind, self.names[node], self.names[other]))
        self.changes.append(Change(module_path(node), self.names[node], what))

    def sweep(self) -> None:
        """Erase what nothing reads."""
        for node in reversed(list(self.graph.nodes)):
            idle = not node.users and node.op not in ("placeholder", "output")
            if idle and is_pure(self.module, node):
                self.steps.append(Step("erase", self.names[node]))
                self.graph.erase_node(node)

    def store_constants(self) -> None:
        """Let buffers hold what no input changes."""
        taken: list[str] = []
        self.memory = Memory(self.module, self.graph)
        found = ConstantSubgraphs(self.module, self.graph, self.memory)
        for node, value in found.worth_storing(self.max_constant):
            prefix = module_path(node)
            while prefix not in self.modules:
                prefix = prefix.rpartition(".")[0]
            path = fresh_path(self.modules[prefix], prefix, "constant", taken)
            taken.append(path)
            shape = "x".join(map(str, value.shape)) or "one number"
            what = f"{self.label(node)} depends on no input: computed once, as '{path}' ({shape})"
            self.changes.append(Change(module_path(node), self.names[node], what))
            self.steps.append(Step("store", self.names[node], path))
            with self.graph.inserting_before(node):
                stored = self.graph.get_attr(path)
            self.names[stored] = self.names[node]
            node.replace_all_uses_with(stored)

    def is_reshape_twice(self, node: fx.Node) -> bool:
        """Say whether a node reshapes what nothing but it reads, and which is a reshaped value."""
        source = node.args[0] if node.args else None
        if node.target not in _RESHAPES or not isinstance(source, fx.Node) or not source.args:
            return False
        known = source.target in _FLAT if node.target in _COPYING else source.target == "view"
        # view(dtype) takes the bytes for other numbers.
        sizes = [item for item in (*node.args, *source.args) if not isinstance(item, torch.dtype)]
        plain = len(sizes) == len(node.args) + len(source.args) and "dtype" not in source.kwargs
        return known and plain and len(source.users) == 1 and isinstance(source.args[0], fx.Node)

    def label(self, node: fx.Node) -> str:
        called = called_module(self.module, node)
        if called is not None:
            return f"{type(called).__name__} '{node.target}'"
        return f"{getattr(node.target, '__name__', node.target)} '{self.names[node]}'"

    def tell(self, node: fx.Node, reason: str) -> None:
        name = self.names[node]
        self.skipped[name] = Skip(module_path(node), name, reason)


_VIEWS = frozenset({Kind.ALIAS, Kind.DROP, Kind.SLICE, Kind.ITEM, Kind.SPLIT})
# They fail, or tell, where a value is not laid out as they want it.
_STRICT = frozenset({"view", "view_as", "unflatten", "stride", "is_contiguous"})
_COPYING = frozenset({"reshape", torch.reshape})
_RESHAPES = _COPYING | {"view"}
_FLAT = _RESHAPES | {"flatten", torch.flatten, "unsqueeze", torch.unsqueeze}


_JOINS = frozenset({torch.cat, torch.concat, torch.concatenate})


def _rest(node: fx.Node) -> Any:
    """Return the arguments of a concatenation behind its tensors."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    others = {*node.kwargs} - {"dim", "axis"}
    return dim if isinstance(dim, int) and not others and len(node.args) <= 2 else id(node)


def splice(node: fx.Node, inner: fx.Node) -> None:
    """Let a concatenation join what another joins, in its place."""
    items: Any = node.args[0]
    parts: Any = inner.args[0]
    node.update_arg(0, [part for item in items for part in (parts if item is inner else (item,))])


def _frozen(value: Any) -> Any:
    """Return an argument as something that is equal for equal ones, and hashable."""
    if isinstance(value, fx.Node):
        return ("get_attr", str(value.target)) if value.op == "get_attr" else ("node", id(value))
    if isinstance(value, tuple | list):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _frozen((value.start, value.stop, value.step)))
    return (type(value).__name__, repr(value))


class _Surgeon(Editor):
    """Makes the edits that a trial wrote down."""

    def do(self, step: Step) -> None:
        """Make one edit."""
        node = self.nodes[step.node]
        if step.kind == "replace":
            node.replace_all_uses_with(self.nodes[step.other])
            self.erase(node)
        elif step.kind == "reread":
            node.update_arg(0, self.nodes[step.other])
        elif step.kind == "splice":
            splice(node, self.nodes[step.other])
        elif step.kind == "erase":
            if not node._erased:
                self.erase(node)
        else:
            value = ConstantSubgraphs.value(self.module, node)
            assert isinstance(value, Tensor)
            prefix, _, name = step.other.rpartition(".")
            self.module.get_submodule(prefix).register_buffer(name, value)
            with self.graph.inserting_before(node):
                stored = self.graph.get_attr(step.other)
            self.place(stored, node)
            node.replace_all_uses_with(stored)
            if "tensor_meta" in node.meta:
                stored.meta["tensor_meta"] = node.meta["tensor_meta"]
