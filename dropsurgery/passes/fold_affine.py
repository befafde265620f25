"""Every affine map of channels into the weights around it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from dropsurgery.errors import PassError
from dropsurgery.graph.gauge import path_from_json
from dropsurgery.graph.ledger import Deposit, Move
from dropsurgery.graph.trace import keep_eval
from dropsurgery.graph.two_mode import TwoModeGraphModule
from dropsurgery.passes.affine_plan import Planner
from dropsurgery.passes.affine_steps import Rewrite, Write
from dropsurgery.passes.affine_surgeon import Surgeon
from dropsurgery.passes.base import Change, Pass, Plan

Step = Move | Write | Rewrite


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Let every affine map of channels travel until weights take it in.

    A BatchNorm in eval mode computes y = s·x + t for every channel; so do layer scale, a
    FrozenBatchNorm, the normalisation of an input, a dropout's factor in eval. Each of s and t is
    moved by itself, back to what produces x or forward to what reads y, through every operation
    that commutes with it (`dropsurgery.graph.transfer_rules` has the rules and their conditions),
    until layers have taken it into their weights: convolutions and transposed convolutions, linear
    layers, the affine part of LayerNorm, GroupNorm and InstanceNorm, other BatchNorms; tables of
    embeddings, stored matrices that values are multiplied with (x @ W, which becomes a linear
    layer where it needs a bias), and tensors that are added, multiplied or joined (positions, class
    tokens, gains), each as long as nothing else reads it. Where one of the two cannot leave, what
    stays is a single addition (`layers.ChannelShift`) or multiplication (`layers.ChannelScale`) in
    place of the BatchNorm, never more.

    Several readers are no obstacle where each of them can make up for the change: the shift of a
    BatchNorm on a residual stream goes into the convolution before the stream's add, and out of
    the branches that join it later.

    The arithmetic is float64 and each weight is rounded once, however many maps it takes in.
    Which axis carries the channels is proved; for much of a graph that takes example inputs:
    `ds.apply(model, ds.FoldAffine(), example_inputs=(x,))`.

    New parameters keep dtype, device, strides and `requires_grad`. A layer that is called at
    several places is written once where all of them need the same weights, else calls get copies
    (`<path>_folded`). Tied parameters become the folded layer's own; the others keep theirs.

    Left alone, with the reason: BatchNorms in training mode, without running statistics or with
    ones that are not finite; folds whose weights the layer's dtype cannot hold; whatever an
    operation in the way does not commute with, such as a negative scale before a ReLU.

    The result is an inference graph, as `FoldBatchNorm`'s is.

    Args:
        border_maps: what becomes of a shift whose only way leads into a convolution that pads with
            zeros. Its effect on the output differs at the borders: a map (C, H, W) that is added
            behind the convolution is exact for images of the traced size, **and for no other**.
            "never" leaves the shift where it is; "cost" makes the map where it is less work than
            the addition that it saves (the output is small beside the input) and example inputs
            tell the size; "always" wherever example inputs tell it.
        steps: what to do, as a saved surgery lists it: exactly this, on the word of whoever proved
            then that it is exact (the weights may not be there yet). None folds what can be
            proved.

    Raises:
        PassError: `steps` names a node that is not there; an unknown `border_maps`.
    """

    keeps_state_dict_keys: ClassVar[bool] = False
    border_maps: Literal["never", "cost", "always"] = "never"
    steps: tuple[Step, ...] | None = field(default=None, repr=False)

    def check(self, module: fx.GraphModule) -> None:
        """Raise `PassError` where `border_maps` is none of the three."""
        if self.border_maps not in ("never", "cost", "always"):
            raise PassError(
                f"border_maps is {self.border_maps!r}", fix='"never", "cost" or "always"'
            )

    def plan(self, module: fx.GraphModule) -> Plan:
        """Return where each map goes, and why the others stay."""
        if self.steps is None:
            return Planner(module, self.border_maps).plan()
        names = {node.name for node in module.graph.nodes}
        missing = sorted({name for step in self.steps for name in _names(step)} - names)
        if missing:
            raise PassError(
                f"FoldAffine is to change {', '.join(missing)}, and there is no such node",
                fix="the network that the surgery was saved from",
            )
        moves = [step for step in self.steps if isinstance(step, Move)]
        found = (Change("", m.source, f"{m.part} of '{m.source}' moved, as saved") for m in moves)
        return Plan(tuple(found), steps=self.steps)

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Write the weights, one at a time, then take out what nothing uses any more."""
        if not plan.steps:
            return
        surgeon = Surgeon(module)
        with torch.no_grad():
            surgeon.run(plan.steps)
        if isinstance(module, TwoModeGraphModule):
            keep_eval(module)
        surgeon.clear()

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return what was done: other weights or inputs would prove something else."""
        kinds = {Move: "move", Write: "write", Rewrite: "rewrite"}
        steps = [{"step": kinds[type(s)], **dataclasses.asdict(s)} for s in plan.steps]
        return {"pass": self.name, "steps": steps}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FoldAffine:
        """Build the pass again from what `to_json` wrote."""
        return cls(steps=tuple(_step(dict(entry)) for entry in data["steps"]))


def _names(step: Step) -> tuple[str, ...]:
    if isinstance(step, Move):
        return (step.source, *(deposit.node for deposit in step.deposits))
    return step.nodes if isinstance(step, Write) else (step.node,)


def _step(entry: dict[str, Any]) -> Step:
    kind = entry.pop("step")
    if kind == "rewrite":
        return Rewrite(**{**entry, "fresh": tuple(entry.get("fresh", ()))})
    if kind == "write":
        nodes, size = tuple(entry.pop("nodes")), tuple(entry.pop("size"))
        return Write(nodes=nodes, size=size, **entry)
    deposits = (
        Deposit(**{**deposit, "path": path_from_json(deposit["path"])})
        for deposit in entry.pop("deposits")
    )
    return Move(**entry, deposits=tuple(deposits))
