"""Cutout at a network's image input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from dropsurgery.errors import ArgumentTypeError, PassError
from dropsurgery.graph.channels import Shapes
from dropsurgery.graph.module import called_module, fresh_path, graphs
from dropsurgery.graph.ops import Kind, kind_of
from dropsurgery.layers.cutout import Cutout
from dropsurgery.passes.base import Change, Pass, Plan
from dropsurgery.passes.insert_base import check_training, insert_after, place_layer

# What an image may go through, pixel by pixel, before the first convolution.
_PIXELWISE = frozenset({Kind.ADD, Kind.SUB, Kind.PRODUCT, Kind.DROP})


@dataclass(frozen=True)
class InsertCutout(Pass):
    """Put `ds.layers.Cutout` at a network's image input.

    It works in training only: the eval output stays bit-identical. The state-dict keys stay the
    same. `ds.RemoveDrops()` takes it out again. Who computes losses on the images themselves (an
    autoencoder) sees the uncut ones: what is cut is what the network reads.

    Args:
        size: edge of the square in pixels.
        p: probability of cutting an image, in [0, 1].
        value: what is written into the square.
        input: name of the input; without, the one input that is an image: read by a 2-d
            convolution, or of rank 4 for the example inputs.

    Raises:
        ArgumentError, ArgumentTypeError: as `ds.layers.Cutout`.
        PassError: no input is an image, several are, or `input` names none; or the network's
            training graph could not be traced.
    """

    size: int = 16
    p: float = 1.0
    value: float = 0.0
    input: str | None = None

    def __post_init__(self) -> None:
        layer = Cutout(self.size, self.p, value=self.value)
        object.__setattr__(self, "p", layer.p)
        if self.input is not None and not isinstance(self.input, str):
            raise ArgumentTypeError(f"input is the name of an input, got {self.input!r}")

    def check(self, module: fx.GraphModule) -> None:
        """Refuse a network whose training forward is not known."""
        check_training(module, self.name)

    def plan(self, module: fx.GraphModule) -> Plan:
        """Find the image input."""
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        known = ", ".join(str(node.target) for node in inputs)
        if self.input is None:
            shapes = Shapes(module, module.graph)
            images = [node for node in inputs if _is_image(module, shapes, node)]
        else:
            images = [node for node in inputs if node.target == self.input]
        if len(images) != 1:
            found = "no input" if not images else f"{len(images)} inputs"
            wanted = "is an image" if self.input is None else f"is named {self.input!r}"
            raise PassError(
                f"InsertCutout needs one image input, and {found} of the network {wanted}",
                where=f"inputs: {known}",
                fix="InsertCutout(input='…'), or example_inputs, which tell the ranks",
            )
        name = str(images[0].target)
        path = fresh_path(module, "", "cutout")
        layer = Cutout(self.size, self.p, value=self.value)
        change = Change("", images[0].name, f"inserted '{path}' at the input '{name}': {layer}")
        return Plan((change,), steps=((name, path),))

    def perform(self, module: fx.GraphModule, plan: Plan) -> None:
        """Add the layer, and its call in each graph."""
        for name, path in plan.steps:
            place_layer(module, path, Cutout(self.size, self.p, value=self.value), "")
            for graph in graphs(module):
                image = next(n for n in graph.nodes if n.op == "placeholder" and n.target == name)
                insert_after(image, path, image)

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return the parameters, with the input that was found."""
        return {**super().to_json(plan), "input": plan.steps[0][0]}


def _is_image(module: fx.GraphModule, shapes: Shapes, node: fx.Node) -> bool:
    """Say whether an input is (N, C, H, W): a 2-d convolution reads it, or its rank says so."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            called = called_module(module, user)
            if isinstance(called, nn.Conv2d) or user.target is F.conv2d:
                return True
            if kind_of(module, user) in _PIXELWISE and user not in seen:
                seen.add(user)
                pending.append(user)
    moved = any("permute" in str(user.target) for user in node.users)
    return shapes.rank(node) == 4 and not moved
