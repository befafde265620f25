"""How a drop probability grows over training: shares of its final value, as pure floats.

A ramp is called as `ramp(step)`, steps counted from 0, and returns which share of the final drop
probability holds at that step, in [0, 1]; any callable of that form will do.

| ramp | share at step t |
|---|---|
| `linear` | 0 until `start`, then up to 1 over `steps` |
| `cosine` | the same in the shape of half a cosine: slow, fast, slow |
| `step` | 0 before step `at`, 1 from then on ("0 for N steps, then p") |
| `early` | 1 for the first `steps` steps, then 0 (Liu et al. 2023, arXiv:2303.01500) |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dropsurgery.errors import ArgumentError

Ramp = Callable[[int], float]


@dataclass(frozen=True)
class Linear:
    """From 0 at `start` to 1 at `start` + `steps`, in a straight line."""

    steps: int
    start: int = 0

    def __post_init__(self) -> None:
        _check_count(self.steps, "steps", 1)
        _check_count(self.start, "start", 0)

    def __call__(self, step: int) -> float:
        """Return the share at a step."""
        return min(max((step - self.start) / self.steps, 0.0), 1.0)


@dataclass(frozen=True)
class Cosine(Linear):
    """From 0 at `start` to 1 at `start` + `steps`, as half a cosine."""

    def __call__(self, step: int) -> float:
        """Return the share at a step."""
        return 0.5 - 0.5 * math.cos(math.pi * super().__call__(step))


@dataclass(frozen=True)
class Step:
    """0 before step `at`, 1 from then on."""

    at: int

    def __post_init__(self) -> None:
        _check_count(self.at, "at", 0)

    def __call__(self, step: int) -> float:
        """Return the share at a step."""
        return float(step >= self.at)


@dataclass(frozen=True)
class Early:
    """1 for the first `steps` steps, 0 from then on."""

    steps: int

    def __post_init__(self) -> None:
        _check_count(self.steps, "steps", 1)

    def __call__(self, step: int) -> float:
        """Return the share at a step."""
        return float(step < self.steps)


def linear(steps: int, start: int = 0) -> Linear:
    """Return the ramp from 0 at `start` to 1 after `steps` more steps, in a straight line."""
    return Linear(steps, start)


def cosine(steps: int, start: int = 0) -> Cosine:
    """Return the ramp from 0 at `start` to 1 after `steps` more steps, as half a cosine."""
    return Cosine(steps, start)


def step(at: int) -> Step:
    """Return the ramp that is 0 before step `at` and 1 from then on."""
    return Step(at)


def early(steps: int) -> Early:
    """Return the ramp that is 1 for the first `steps` steps and 0 from then on."""
    return Early(steps)


def _check_count(value: object, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} must be an integer of at least {least}, got {value!r}")
