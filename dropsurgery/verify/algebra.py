"""The budget of surgery: one module against another, both in float64, where rounding is gone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Twice as many digits as the rounding of two networks of usual depth takes away in float64.
EXACT = 1e-12
# Two orders of the same sums differ by a few times the error of one of them.
_AMPLIFIED = 64
# Rounding the weights of a folded network costs a tenth to a fifth of what computing in their dtype
# costs (benchmarks/verify_gate.py measures it); where a network magnifies rounding, what single
# inputs show of either spreads as the errors of outputs do, for which `Gate` allows a factor of 5.
_ROUNDED = 5.0


@dataclass(frozen=True)
class Algebra:
    """How far a module is from another one when both compute in float64.

    Attributes:
        error: the worst over the inputs of the difference's root mean square against the output's,
            and of its largest magnitude against the output's.
        limit: the most that is rounding. 1e-12 where the module holds the reference's own weights
            or new ones in float64; more where the network magnifies rounding, as its own error in
            float32 tells. Where new weights were rounded to less than float64, as a folded
            BatchNorm's are, five times the reference's own error in its dtype.
        rounded: the dtype that new weights were rounded to; "" where there are none.
    """

    error: float
    limit: float
    rounded: str

    @property
    def ok(self) -> bool:
        """Whether the error is within its limit."""
        return self.error <= self.limit


@dataclass
class AlgebraTally:
    """Differences of one output over all inputs; nothing is kept but the worst.

    Attributes:
        error: see `Algebra`.
        own: the reference's own error in its dtype, measured alike.
        problem: the first thing that is no matter of numbers.
    """

    error: float = 0.0
    own: float = 0.0
    problem: str = ""

    def add(self, exact: Tensor, other: Tensor, own: float, label: str) -> None:
        """Compare one output on one input.

        Args:
            exact: the float64 run before surgery.
            other: the float64 run after it.
            own: `distance` of a run in the network's own dtype from its float64 run.
            label: the input.
        """
        if exact.shape != other.shape:
            self.problem = self.problem or (
                f"shape {tuple(other.shape)} instead of {tuple(exact.shape)} in float64 ({label})"
            )
        elif exact.is_floating_point() or exact.is_complex():
            finite = exact.isfinite()
            if not torch.equal(finite, other.isfinite()):
                self.problem = self.problem or f"other values are finite in float64 ({label})"
                return
            self.error = max(self.error, distance(exact, other))
            self.own = max(self.own, own)

    def weigh(self, dtype: torch.dtype, rounded: torch.dtype | None) -> Algebra:
        """Return the error beside its limit.

        Args:
            dtype: the output's.
            rounded: the coarsest dtype of the weights that only the other module holds.
        """
        finer = torch.finfo(torch.float64).eps / torch.finfo(dtype).eps
        limit = max(EXACT, _AMPLIFIED * finer * self.own if finer < 1 else 0.0)
        name = ""
        if rounded is not None:
            name = str(rounded).removeprefix("torch.")
            if rounded not in (torch.float64, torch.complex128):
                # One rounding at least, where the output is exact otherwise.
                limit = max(limit, _ROUNDED * self.own, torch.finfo(rounded).eps)
        return Algebra(self.error, limit, name)


def distance(exact: Tensor, other: Tensor) -> float:
    """Return how far two outputs of one shape are apart where both are finite; see `Algebra`."""
    if not exact.is_floating_point() and not exact.is_complex():
        return 0.0
    finite = exact.isfinite() & other.isfinite()
    exact, other = exact[finite], other[finite]
    if not exact.numel():
        return 0.0
    difference = (other.to(exact.dtype) - exact).abs()
    if not difference.any():
        return 0.0
    tiny = torch.finfo(torch.float64).tiny
    rms = float(difference.square().mean().sqrt() / exact.abs().square().mean().sqrt().clamp(tiny))
    return max(rms, float(difference.max() / exact.abs().max().clamp(tiny)))


def rounded_anew(reference: nn.Module, candidate: nn.Module) -> torch.dtype | None:
    """Return the coarsest dtype of the weights that are not among the reference's, if any.

    Surgery that only takes layers out shares every weight; one that folds makes new ones, in
    float64, and rounds them to the dtype of the old.
    """
    known: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
    shared = set()
    for tensor in _floats(reference):
        known.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
        shared.add(_memory(tensor))
    new = {
        tensor.dtype
        for tensor in _floats(candidate)
        if _memory(tensor) not in shared
        and not any(_same(tensor, k) for k in known.get((tensor.shape, tensor.dtype), []))
    }
    return max(new, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _floats(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        # Drop layers keep their rates in buffers, and are the identity in eval mode.
        if type(module).__module__.startswith("dropsurgery.layers."):
            continue
        # A constant may be a plain attribute.
        held: Iterable[object] = (
            *module._parameters.values(),
            *module._buffers.values(),
            *vars(module).values(),
        )
        for value in held:
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                yield value


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _same(one: Tensor, other: Tensor) -> bool:
    if one.device != other.device:
        return False
    if one.numel() and bool(one.detach().flatten()[-1] != other.detach().flatten()[-1]):
        return False  # most are told apart by one number
    return torch.equal(one.detach(), other.detach())
