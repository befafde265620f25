"""Drop rates that change during training."""

from __future__ import annotations

import fnmatch
import math
from typing import Any, Literal, get_args

from torch import nn

from dropsurgery.errors import ArgumentError, ArgumentTypeError, PassError
from dropsurgery.graph.drops import is_classic, is_drop, rate, rate_name, set_rate

Shape = Literal["linear", "cosine", "step"]


class RateSchedule:
    """Brings the rates of drop layers from a fraction of what they are to all of it.

    Every layer keeps its own target: the rate that it has when the schedule is made. At step t the
    rate is target · (start + (1 - start)·f), where f goes from 0 to 1 during `steps` steps that
    begin after `delay`. For DropBlock this is the schedule of its paper, whose keep_prob goes
    linearly from 1 to its target.

    Compiled networks take a new rate without compiling again (but for
    `WeightedChannelDropout.random_p`, which no schedule changes).

    Args:
        module: the network; its drop layers are changed in place, and have the rate of step 0 at
            once.
        steps: how many steps the ramp takes, at least 1.
        shape: "linear"; "cosine", which starts and ends flat; or "step", all at once at the end.
        start: which fraction of the target the rates begin at, in [0, 1].
        delay: how many steps come before the ramp.
        where: patterns for the paths of the layers, as in `fnmatch`; every drop layer without.

    Raises:
        ArgumentError, ArgumentTypeError: steps, shape, start or delay that cannot be.
        PassError: no drop layer is there, or `where` matches none.
    """

    def __init__(
        self,
        module: nn.Module,
        steps: int,
        *,
        shape: Shape = "linear",
        start: float = 0.0,
        delay: int = 0,
        where: str | tuple[str, ...] | None = None,
    ) -> None:
        for name, value, least in (("steps", steps, 1), ("delay", delay, 0)):
            if type(value) is not int or value < least:
                raise ArgumentError(f"{name} must be an int of {least} or more, got {value!r}")
        if shape not in get_args(Shape):
            known = ", ".join(map(repr, get_args(Shape)))
            raise ArgumentError(f"unknown shape {shape!r}", fix=f"one of {known}")
        if not isinstance(start, int | float) or not 0.0 <= start <= 1.0:
            raise ArgumentError(f"start must lie in [0, 1], got {start!r}")
        self.steps, self.shape, self.start, self.delay = steps, shape, float(start), delay
        patterns = (where,) if isinstance(where, str) else where
        self._layers = {
            path: layer
            for path, layer in module.named_modules()
            if (is_drop(layer) or is_classic(layer))
            and rate_name(layer) is not None
            and (patterns is None or any(fnmatch.fnmatchcase(path, p) for p in patterns))
        }
        if not self._layers:
            raise PassError(
                "there is no drop layer to schedule"
                if patterns is None
                else f"where={where!r} matches no drop layer",
                fix="ds.find_drops(module) lists them",
            )
        self.targets = {path: rate(layer) for path, layer in self._layers.items()}
        self.now = 0
        self._set()

    def fraction(self, step: int) -> float:
        """Return which fraction of their target the rates have at a step."""
        share = min(max((step - self.delay) / self.steps, 0.0), 1.0)
        if self.shape == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        elif self.shape == "step":
            share = float(share == 1.0)
        return self.start + (1.0 - self.start) * share

    def step(self) -> None:
        """Go on by one training step, and set the rates."""
        self.now += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold: the step and the targets."""
        return {"now": self.now, "targets": dict(self.targets)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the step of a checkpoint, and set the rates.

        Raises:
            ArgumentTypeError: the state is not that of a schedule of these layers.
        """
        if set(state) != {"now", "targets"} or set(state["targets"]) != set(self._layers):
            raise ArgumentTypeError(
                "this is not the state of a RateSchedule for these layers",
                fix="a schedule with the same `where` on the same surgery",
            )
        self.now, self.targets = int(state["now"]), dict(state["targets"])
        self._set()

    def _set(self) -> None:
        fraction = self.fraction(self.now)
        for path, layer in self._layers.items():
            set_rate(layer, self.targets[path] * fraction)
