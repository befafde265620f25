"""What the passes share that insert drop layers: the plan, the new calls, and how they are marked.

A mark on a node (`graph.drops.INSERTED_DROP`) says what `RemoveDrops` has to do with it:
("call",) a drop, which is bypassed; ("operand",) a node that only the insertion needed;
("rewritten", path, keyword) a layer call that became a function call, and becomes a call of the
layer at `path` again, with its input as a keyword or not.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import fx, nn

from dropsurgery.errors import ArgumentError, PassError
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.drops import INSERTED_DROP
from dropsurgery.graph.module import (
    Skip,
    called_module,
    fresh_path,
    graphs,
    module_path,
    place_like,
)
from dropsurgery.graph.two_mode import TwoModeGraphModule
from dropsurgery.passes.base import Change, Pass, Plan
from dropsurgery.passes.insert_choice import (
    Found,
    Kinds,
    Where,
    check_kinds,
    choose,
    find_spots,
    output_of,
    parted_from,
)
from dropsurgery.passes.where import check_where

# A place and the form that the layer takes there (spatial axes, for those that have forms).
Places = tuple[tuple[str, int], ...]


class Unusable(Exception):
    """A place at which this layer cannot be inserted; the message says why."""


@dataclass(frozen=True)
class Step:
    """One new call: `form` is what `form_at` said, `before` whether it comes before the node."""

    graph: int
    node: str
    path: str
    form: int
    before: bool


@dataclass(frozen=True, kw_only=True)
class Insertion(Pass):
    """A pass that puts a layer before or after chosen layers.

    Args:
        before: kinds of layers whose input is dropped (the first, if there are several): a class
            name ("Linear", "Conv2d"), a group ("activation", "conv", "norm", "pool", "add"), or a
            tuple of such. Functions count as the class that does the same (`F.relu` as "ReLU").
        after: kinds of layers whose output is dropped.
        where: which of them: a pattern for the path (`"layer4.*"`, as in `fnmatch`), the name of a
            node, a tuple of such, or a callable that takes a `Spot`. Without `before` and `after`,
            and where the layer has no usual place, the output of what `where` names is dropped.
        skip_first: how many of the chosen, from the front, are left out.
        skip_last: how many from the back.
        places: exactly these, as a saved surgery lists them: (node, form), on the word of whoever
            proved then that they fit (the shapes may not be known now).
    """

    before: Kinds = None
    after: Kinds = None
    where: Where = None
    skip_first: int = 0
    skip_last: int = 0
    places: Places | None = None

    # The name of the new layers, and where they go if the caller does not say.
    layer_name: ClassVar[str] = "drop"
    usual: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", check_kinds(self.before, "before"))
        object.__setattr__(self, "after", check_kinds(self.after, "after"))
        fix = "'layer4.*', ('layer3.*', 'layer4.*') or lambda spot: spot.index > 2"
        object.__setattr__(self, "where", check_where(self.where, "places", fix))
        if self.places is not None:
            places = tuple((str(node), int(form)) for node, form in self.places)
            object.__setattr__(self, "places", places)
        if self.before is not None and self.after is not None:
            raise ArgumentError(
                f"{self.name} inserts before or after a layer, got before={self.before!r} and "
                f"after={self.after!r}",
                fix="two passes for both",
            )
        if self.before is None and self.after is None:
            self._take_usual()
        for name in ("skip_first", "skip_last"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ArgumentError(f"{name} is a number of places, got {value!r}")

    def _take_usual(self) -> None:
        """Go where the layer usually goes, since the caller did not say."""
        if self.usual is None and self.where is None:
            raise ArgumentError(
                f"{self.name} needs to know where",
                fix='before="Linear", after="activation", or where="layer4.*"',
            )
        object.__setattr__(self, "after", self.usual)

    @property
    def kinds(self) -> Kinds:
        """Which kinds of layers there are to choose from."""
        return self.before if self.after is None else self.after

    @abstractmethod
    def layer(self, form: int) -> nn.Module:
        """Return a new layer of this form."""

    @abstractmethod
    def form_at(
        self, module: fx.GraphModule, shapes: Shapes, spot: Found, node: fx.Node, value: fx.Node
    ) -> int:
        """Return the form of the layer that fits `value`, the tensor to be dropped at `node`.

        Raises:
            Unusable: none does.
        """

    def check(self, module: fx.GraphModule) -> None:
        """Refuse a network whose training forward is not known."""
        check_training(module, self.name)

    def plan(self, module: fx.GraphModule) -> Plan:
        """Choose the places, prove what fits there, and name the new layers."""
        skipped: list[Skip] = []
        if self.places is None:
            chosen = self._chosen(module, skipped)
        else:
            chosen = _named(module, dict(self.places), self.name)
        shapes = [Shapes(module, graph) for graph in graphs(module)]
        taken: set[str] = set()
        changes, steps = [], []
        for item in chosen:
            try:
                form = self._form(module, shapes, item)
            except Unusable as reason:
                skipped.append(Skip(item.spot.path, item.first.name, str(reason)))
                continue
            prefix = module_path(item.first)
            owner = module.get_submodule(prefix)
            path = fresh_path(owner, prefix, self.layer_name, taken)
            taken.add(path)
            before = self.before is not None
            steps += [Step(g, node.name, path, form, before) for g, node in item.nodes]
            what = f"inserted '{path}' {'before' if before else 'after'} '{item.spot.path}'"
            changes.append(Change(prefix, item.first.name, f"{what}: {self.layer(form)}"))
        if not changes:
            reasons = ", ".join(sorted({skip.reason for skip in skipped}))
            raise PassError(
                f"{self.name} can use none of the {len(skipped)} places",
                where=reasons,
                fix="other layers in before, after or where; example_inputs prove more shapes",
            )
        return Plan(tuple(changes), tuple(skipped), tuple(steps))

    def _chosen(self, module: fx.GraphModule, skipped: list[Skip]) -> list[Found]:
        """Return the chosen spots without those that are skipped by number."""
        chosen = choose(module, self.kinds, self.where, self.name)
        last = len(chosen) - self.skip_last
        for place, item in enumerate(chosen):
            if not self.skip_first <= place < last:
                reason = f"skip_first={self.skip_first}, skip_last={self.skip_last}"
                skipped.append(Skip(item.spot.path, item.first.name, reason))
        return chosen[self.skip_first : max(last, 0)]

    def _form(self, module: fx.GraphModule, shapes: list[Shapes], item: Found) -> int:
        """Return the one form that fits in each graph that has the spot."""
        if len(graphs(module)) > 1 and item.nodes[-1][0] == 0:
            raise Unusable("it is not in the training graph")
        forms = set()
        for number, node in item.nodes:
            value = self._value(module, node)
            shared = parted_from(module, node)
            if shared is not None:
                raise Unusable(
                    f"it shares memory with '{shared.name}', which others read and something "
                    "writes into"
                )
            near = value.users if self.before is None else (value,)
            if any(self._is_own(module, user) for user in near):
                raise Unusable("an inserted layer of this kind is there already")
            if self.places is not None:
                forms.add(dict(self.places)[item.spot.node])
            else:
                forms.add(self.form_at(module, shapes[number], item, node, value))
        if len(forms) != 1:
            raise Unusable("its eval and its training graph have it at different ranks")
        return forms.pop()

    def _value(self, module: fx.GraphModule, node: fx.Node) -> fx.Node:
        """Return the tensor that is to be dropped at a node."""
        if self.before is None:
            value = output_of(module, node)
            if value is None:
                raise Unusable("it returns several values, and not one place reads the first")
            return value
        first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        if not isinstance(first, fx.Node):
            raise Unusable("its input is not one tensor")
        return first

    def _is_own(self, module: fx.GraphModule, node: fx.Node) -> bool:
        called = called_module(module, node)
        return (
            INSERTED_DROP in node.meta
            and called is not None
            and str(node.target).rpartition(".")[2].startswith(self.layer_name)
        )

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Add the layers and their calls."""
        named = [{node.name: node for node in graph.nodes} for graph in graphs(module)]
        for step in plan.steps:
            node = named[step.graph][step.node]
            value = self._value(module, node)
            place_layer(module, step.path, self.layer(step.form), module_path(node))
            if not step.before:
                insert_after(value, step.path, node)
                continue
            with node.graph.inserting_before(node):
                call = node.graph.call_module(step.path, (value,))
            mark(call, node, value)
            if node.args:
                node.args = (call, *node.args[1:])
            else:
                node.kwargs = {**node.kwargs, next(iter(node.kwargs)): call}

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return the parameters, with the places that were decided on."""
        data = {**super().to_json(plan), "places": _places(plan)}
        data["where"] = None if callable(self.where) else self.where
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Build the pass from what `to_json` wrote."""
        places = tuple((node, form) for node, form in data["places"])
        where = data["where"]
        if where is None and data["before"] is None and data["after"] is None:
            where = tuple(node for node, _ in places)
        return cls(**{**data, "places": places, "where": where})


def check_training(module: fx.GraphModule, name: str) -> None:
    """Raise where a network has no training graph to drop in."""
    if isinstance(module, TwoModeGraphModule) and module.train_error is not None:
        raise PassError(
            f"{name} needs the training forward, which could not be traced",
            where=module.train_error.where,
            fix=module.train_error.fix,
        ) from module.train_error


def place_layer(module: fx.GraphModule, path: str, layer: nn.Module, owner: str) -> None:
    """Put a new layer at a path, in the mode of the module that calls it, unless it is there."""
    prefix, _, name = path.rpartition(".")
    parent = module.get_submodule(prefix)
    if name not in parent._modules:
        parent.add_module(name, layer.train(module.get_submodule(owner).training))


def insert_after(value: fx.Node, path: str, neighbour: fx.Node) -> None:
    """Let every reader of a value read it through a new call of the layer at `path`."""
    inputs = [node for node in value.graph.nodes if node.op == "placeholder"]
    with value.graph.inserting_after(inputs[-1] if value in inputs else value):
        call = value.graph.call_module(path, (value,))
    mark(call, neighbour, value)
    value.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)


def mark(call: fx.Node, neighbour: fx.Node, value: fx.Node) -> None:
    """Give a new drop call its place, its shape and its mark."""
    place_like(call, neighbour)
    if "tensor_meta" in value.meta:
        call.meta["tensor_meta"] = value.meta["tensor_meta"]
    call.meta[INSERTED_DROP] = ("call",)


def _named(module: fx.GraphModule, places: dict[str, int], title: str) -> list[Found]:
    """Return the spots of these names.

    Raises:
        PassError: one is not in the network.
    """
    found = {item.spot.node: item for item in find_spots(module, None)}
    missing = [name for name in places if name not in found]
    if missing:
        raise PassError(
            f"{title} was to insert at '{missing[0]}', which the network does not have",
            fix="the network that the places were chosen in",
        )
    return [found[name] for name in places]


def _places(plan: Plan) -> list[list[Any]]:
    """Return [node, form] of each place of a plan; a spot of two graphs once."""
    by_path: dict[str, list[Any]] = {}
    for step in plan.steps:
        name = step.node if step.graph == 0 else f"train:{step.node}"
        by_path.setdefault(step.path, [name, step.form])
    return list(by_path.values())
