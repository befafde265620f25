"""Draws that do not depend on a generator's state: the same on every rank, and after a restart."""

from __future__ import annotations

import torch
from torch import Tensor

from dropsurgery.errors import ArgumentError

_INCREMENT = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_BITS = (1 << 64) - 1


class Draws:
    """Random numbers as a function of (seed, step, site): a counter-based generator.

    The mixing function is that of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom
    Number Generators", OOPSLA 2014). Nothing is consumed: two ranks with one seed draw the same, a
    recomputed forward (activation checkpointing) draws what the first one drew, and `seed` and
    `step` are all that a checkpoint has to hold.

    Args:
        seed: any integer.
        rank: mixed into the seed; None where every process is to draw the same.

    Attributes:
        seed, rank: as given.
        step: which training step it is, from 0.
    """

    def __init__(self, seed: int, rank: int | None = None) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ArgumentError(f"seed must be an integer, got {seed!r}")
        self.seed = seed
        self.rank = rank
        self.step = 0
        self._key = _mix_int(_mix_int(seed) + (rank or 0) * _INCREMENT)
        # The step where the masks are made: compiled code must not see it as a constant.
        self._counter = torch.zeros((), dtype=torch.int64)

    def advance(self) -> None:
        """Count one training step."""
        self._go_to(self.step + 1)

    def state_dict(self) -> dict[str, int]:
        """Return the seed and the step."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved step.

        Raises:
            ArgumentError: the state is of draws from another seed.
        """
        if state.get("seed") != self.seed:
            raise ArgumentError(f"the state is of seed {state.get('seed')!r}, not {self.seed}")
        self._go_to(int(state["step"]))

    def _go_to(self, step: int) -> None:
        self.step = step
        self._counter.fill_(step)

    def uniform(self, count: int, site: int, device: torch.device) -> Tensor:
        """Return float64 (count,) in [0, 1), one number for each sample."""
        if self._counter.device != device:
            self._counter = self._counter.to(device)
        key = _mix(_mix(self._counter + _wrap(self._key)) + _wrap(site * _INCREMENT))
        bits = _mix(key + torch.arange(1, count + 1, device=device) * _wrap(_INCREMENT))
        return _shift(bits, 11).double() * 2.0**-53

    def number(self, site: int) -> float:
        """Return one float in [0, 1), on the host."""
        key = _mix_int(self.step + self._key)
        return (_mix_int(_mix_int(key + site * _INCREMENT) + _INCREMENT) >> 11) * 2.0**-53


def _wrap(value: int) -> int:
    """Return an integer modulo 2^64 as a signed one."""
    value &= _BITS
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right without carrying the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _wrap(_FACTORS[0])
    x = (x ^ _shift(x, 27)) * _wrap(_FACTORS[1])
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    x &= _BITS
    x = (x ^ (x >> 30)) * _FACTORS[0] & _BITS
    x = (x ^ (x >> 27)) * _FACTORS[1] & _BITS
    return x ^ (x >> 31)
