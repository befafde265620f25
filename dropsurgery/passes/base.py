"""What a pass is: a frozen dataclass that plans on a graph and then carries the plan out."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from dropsurgery.errors import ArgumentTypeError, PassError
from dropsurgery.graph.module import Skip, graphs, history
from dropsurgery.graph.trace import trace
from dropsurgery.tables import render


@dataclass(frozen=True)
class Change:
    """Something that a pass did.

    Attributes:
        module: dotted path of the module it happened in ("" is the root).
        node: name of the fx node it happened to.
        what: what was done, in one line.
        by: the pass that did it.
    """

    module: str
    node: str
    what: str
    by: str = ""


@dataclass(frozen=True)
class Plan:
    """What a pass is going to do: plain data that a person can print.

    Attributes:
        changes: what will be done, for people.
        skipped: what will be left alone, and why.
        steps: the same changes for the pass itself: its own frozen dataclasses, no live nodes.
    """

    changes: tuple[Change, ...] = ()
    skipped: tuple[Skip, ...] = ()
    steps: tuple[Any, ...] = ()


class Pass(ABC):
    """One change to a network. Subclasses are frozen dataclasses of their parameters.

    A pass runs as `check` → `plan` → `perform`: `check` raises a typed error where the network
    cannot be worked on at all, `plan` reads and never mutates, `perform` edits the module, which
    belongs to the pass (the caller's module is never handed to it).
    """

    registry: ClassVar[dict[str, type[Pass]]] = {}
    keeps_state_dict_keys: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Pass.registry[cls.__name__] = cls

    @property
    def name(self) -> str:
        """The class's name, as it stands in reports and in saved surgeries."""
        return type(self).__name__

    def check(self, module: fx.GraphModule) -> None:  # noqa: B027 - most passes need no check
        """Raise `PassError` where this pass cannot work on `module`."""

    @abstractmethod
    def plan(self, module: fx.GraphModule) -> Plan:
        """Return what would be done to `module`, which stays as it is."""

    @abstractmethod
    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Carry out `plan` on `module`, in place."""

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return the parameters as JSON; `plan` lets a pass write down what a callable decided."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {"pass": self.name, **{field.name: getattr(self, field.name) for field in fields}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Pass:
        """Build the pass again from what `to_json` wrote (without the "pass" entry)."""
        return cls(**data)


@dataclass(frozen=True)
class Result:
    """What `apply` returns.

    Attributes:
        module: the new network.
        changes: what was done, site by site.
        skipped: what was left alone, and why.
    """

    module: fx.GraphModule
    changes: tuple[Change, ...]
    skipped: tuple[Skip, ...]

    def __str__(self) -> str:
        done = render(
            ("pass", "module", "node", "what"),
            [(c.by, c.module, c.node, c.what) for c in self.changes],
            title=f"{len(self.changes)} changes",
        )
        left = render(
            ("pass", "module", "node", "reason"),
            [(s.by, s.module, s.node, s.reason) for s in self.skipped],
            title=f"{len(self.skipped)} left alone",
        )
        return f"{done}\n\n{left}"


def apply(model: nn.Module, *passes: Pass, example_inputs: Sequence[Any] | None = None) -> Result:
    """Run passes over a network, in order, and return the new network with what was done.

    Args:
        model: any `nn.Module`, or a GraphModule that dropsurgery returned. It is not changed. The
            new network shares its parameters and buffers, except those that a pass rewrites.
        passes: what to do.
        example_inputs: positional inputs; where given, shapes are known and passes can prove more
            (which axis of a linear layer's output carries the channels).

    Raises:
        TraceError: the network cannot be turned into a graph.
        PassError: a pass was asked for something that this network does not allow.
    """
    for item in passes:
        if not isinstance(item, Pass):
            raise ArgumentTypeError(
                f"apply takes passes, got {item!r}",
                fix="pass instances, for example ds.FoldBatchNorm()",
            )
    module = trace(model, example_inputs=example_inputs)
    changes: list[Change] = []
    skipped: list[Skip] = []
    for item in passes:
        plan = run(item, module)
        changes += [dataclasses.replace(change, by=item.name) for change in plan.changes]
        skipped += [dataclasses.replace(skip, by=item.name) for skip in plan.skipped]
    return Result(module, tuple(changes), tuple(skipped))


def run(item: Pass, module: fx.GraphModule) -> Plan:
    """Run one pass on a module that the caller owns, in place, and hold it to its promises."""
    item.check(module)
    keys = list(module.state_dict(keep_vars=True))
    plan = item.plan(module)
    item.perform(module, plan)
    for graph in graphs(module):
        graph.lint()
    module.recompile()
    if item.keeps_state_dict_keys and list(module.state_dict(keep_vars=True)) != keys:
        raise PassError(
            f"{item.name} promised to keep the state-dict keys and did not",
            fix="please report this with the model's name",
        )
    history(module)["passes"].append(item.to_json(plan))
    return plan
