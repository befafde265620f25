"""Rates of every kind of drop layer, while training goes on."""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import nn

from dropsurgery.errors import ArgumentError, ArgumentTypeError, PassError
from dropsurgery.graph.drops import is_classic, is_drop, rate, rate_name, set_rate
from dropsurgery.ramps import Ramp
from dropsurgery.survival import check_probability


class RateSchedule:
    """Lets the rates of a network's drop layers grow, or end, over training.

    At step t every layer has its final rate, which is the one it has when the schedule is made,
    times `ramp(t)`. The first step's rates are set at once; call `step()` after each training
    step, as with a learning-rate scheduler. With `ds.ramps.linear` it is the schedule of the
    DropBlock paper, whose keep_prob goes from 1 to its target. (`SurvivalSchedule` does the same
    for drop paths alone, and takes a rule.)

    A compiled network takes a new rate without compiling again, but for torch's own dropout layers
    (torch 2.13 compiles these for each rate), and for the change from rate 0 to another.

    Args:
        module: the network; the rates of its drop layers are changed in place.
        ramp: ramp(step) → share of the final rate, in [0, 1]; see `ds.ramps`.
        where: patterns for the paths of the layers, as in `fnmatch`; every drop layer without.

    Raises:
        ArgumentError: the ramp gives something outside [0, 1].
        ArgumentTypeError: `ramp` is not callable.
        PassError: no drop layer is there, or `where` matches none.
    """

    def __init__(
        self, module: nn.Module, ramp: Ramp, *, where: str | tuple[str, ...] | None = None
    ) -> None:
        if not callable(ramp):
            raise ArgumentTypeError(
                f"ramp must be a callable of the step, got {ramp!r}", fix="ds.ramps.linear(1000)"
            )
        self._layers = self._find(module, where)
        self.ramp = ramp
        self.count = 0
        self.final = {path: rate(layer) for path, layer in self._layers.items()}
        self._set()

    def _find(self, module: nn.Module, where: str | tuple[str, ...] | None) -> dict[str, nn.Module]:
        """Return the layers whose rates are scheduled, by path."""
        patterns = (where,) if isinstance(where, str) else where
        layers = {
            path: layer
            for path, layer in module.named_modules()
            if (is_drop(layer) or is_classic(layer))
            and rate_name(layer) is not None
            and (patterns is None or any(fnmatch.fnmatchcase(path, p) for p in patterns))
        }
        if not layers:
            raise PassError(
                "the network has no drop layer with a rate"
                if patterns is None
                else f"where={where!r} matches no drop layer",
                fix="ds.find_drops(module) lists them",
            )
        return layers

    def step(self) -> None:
        """Count one training step and set the rates of the next."""
        self.count += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the final rates (the ramp itself is the caller's to build again)."""
        return {"step": self.count, "final": dict(self.final)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another schedule of the same network stood.

        Raises:
            ArgumentError: the state is of other layers, or damaged.
        """
        final, count = state.get("final", {}), state.get("step")
        if final.keys() != self.final.keys():
            odd = sorted(set(final) ^ set(self.final))[0]
            raise ArgumentError(
                f"the state is of other layers: only one of the two schedules has '{odd}'"
            )
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ArgumentError(f"step must be an integer of at least 0, got {count!r}")
        self.final = {path: check_probability(p, f"'{path}'") for path, p in final.items()}
        self.count = count
        self._set()

    def _set(self) -> None:
        share = check_probability(self.ramp(self.count), f"the ramp at step {self.count}")
        for path, layer in self._layers.items():
            set_rate(layer, self.final[path] * share)
