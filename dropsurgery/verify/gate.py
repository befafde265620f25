"""When a candidate's numbers are as good as the reference's own: the arithmetic, and nothing else.

Every error is measured against a float64 run of the reference, and the yardstick is the error of
the reference itself in its own dtype. Rounding puts both at the same size whatever the network's
depth, width or scale; a changed weight, epsilon or activation does not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dropsurgery.errors import ArgumentError


@dataclass(frozen=True)
class Gate:
    """How far a candidate may be from the float64 run, in multiples of the reference's own error.

    Four ratios are taken over all inputs, each of which counts the same whatever the size of its
    output. Errors are relative to the output's root mean square. Where an output has few values,
    which estimate an error poorly, the limits are wider (`widened`).

    A change is caught where it moves the outputs by more than a few times the network's own
    rounding, on at least one input. One that moves them by less cannot be told from rounding by any
    comparison of outputs: a mean of one channel whose ReLU is shut on every input; a term of 1e-3
    beside activations of 1e5, whose float32 neighbours are 1e-2 apart. The latter is the rule in
    the second half of a network of 50 residual blocks whose weights were drawn at random and whose
    every block doubles the variance: there a BatchNorm's mean may be off by 1e-3 unseen, unless
    faint inputs keep the activations small (they do where biases and means are zero). Trained
    networks keep their activations near one. Comparing in float64, `reference.double()` against
    `candidate.double()`, sees six digits further.

    Attributes:
        rmse: limit of the ratio of root-mean-square errors.
        maximum: limit of the ratio of largest errors: one wrong element among many.
        typical: limit of the ratio of geometric means of errors: small elements that are wrong
            beside large ones, whose rounding would hide them in the other two.
        mean: limit of the ratio of errors after averaging each element over the inputs: rounding
            averages out, and what is left is wrong for every input.
        floor: errors below this many units of rounding (`torch.finfo(dtype).eps`) count as none:
            the reference may be exact by luck.

    Raises:
        ArgumentError: a limit is no positive number.
    """

    rmse: float = 3.0
    maximum: float = 5.0
    typical: float = 3.0
    mean: float = 4.0
    floor: float = 2.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ArgumentError(f"Gate.{name} is {value!r}", fix="a positive number")


def widened(limit: float, count: int, spread: float = 1.0) -> float:
    """Return a limit for a ratio of two errors that were estimated from `count` values each.

    The logarithm of such a ratio has a standard deviation of about `spread / sqrt(count)`; four of
    these are allowed for.
    """
    return limit * math.exp(4 * spread / math.sqrt(count))


# A mean over fewer elements says too little of the size of an error.
_FEWEST = 4


def trust_limit(dtypes: Iterable[torch.dtype]) -> float:
    """Return the relative error of a reference beyond which nothing can be concluded.

    Two thirds of the digits of its coarsest dtype are gone then: 0.5 % of the output in float32.
    Deep networks with random weights lose half of them and can still be compared. A network in
    float64 may go through float32 on its way.

    Args:
        dtypes: of the output and of the parameters.
    """
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    return float(max(torch.finfo(dtype).eps for dtype in (torch.float32, *floats)) ** (1 / 3))


def unit(dtype: torch.dtype) -> float:
    """Return the unit of the floor: the spacing of numbers near one.

    For float64 nothing more exact is at hand, so the unit is what a deep network's rounding adds up
    to.
    """
    eps = float(torch.finfo(dtype).eps)
    return 1024 * eps if dtype in (torch.float64, torch.complex128) else eps


@dataclass
class Sums:
    """Errors of one output on one input.

    Attributes:
        count: finite elements.
        scale, peak: root mean square and largest magnitude of the float64 run.
        reference, candidate: root-mean-square errors.
        reference_max, candidate_max: largest errors.
        reference_log, candidate_log: means of the logarithms of errors.
    """

    count: int
    scale: float
    peak: float
    reference: float
    candidate: float
    reference_max: float
    candidate_max: float
    reference_log: float
    candidate_log: float


@dataclass
class Tally:
    """Errors of one output over all inputs.

    Attributes:
        dtype: the output's dtype.
        sums: one entry for each input.
        differing: elements of an exact output (integer, boolean) that differ.
        count: elements that were compared.
        problem: the first thing that no tolerance covers: a shape, a dtype, a NaN.
        differs: whether the reference returned another output for another input.
        calls: inputs that were compared.
        rows, own_total, other_total: rows so far, and the sums over them of each element's error,
            of the reference and of the candidate.
    """

    dtype: torch.dtype
    sums: list[Sums] = field(default_factory=list)
    differing: int = 0
    count: int = 0
    problem: str = ""
    differs: bool = False
    calls: int = 0
    rows: int = 0
    own_total: Tensor | None = None
    other_total: Tensor | None = None
    _seen: Tensor | None = None

    def add(self, native: Tensor, wide: Tensor, candidate: Tensor, label: str) -> None:
        """Compare one output on one input: the reference's, its float64 run's, the candidate's."""
        problem = _mismatch(native, wide, candidate)
        if problem:
            self.problem = self.problem or f"{problem} ({label})"
            return
        self._see(native)
        self.count += native.numel()
        if not (native.is_floating_point() or native.is_complex()):
            # What the float64 run returns is no error, whatever the reference returned: of two
            # classes that are equal but for rounding, either may be the largest.
            self.differing += int(((native != candidate) & (wide != candidate)).sum())
        elif native.numel():
            self.sums.append(_sums(native, wide, candidate, unit(self.dtype)))
            self._total(native, wide, candidate, self.sums[-1].scale)

    def _see(self, native: Tensor) -> None:
        # Only as many rows as both have: batches differ in size, and a table of weights that is
        # an output has rows that differ.
        rows = native.clone() if native.ndim else native.reshape(1).clone()
        before = rows[:0] if self._seen is None else self._seen
        common = min(len(rows), len(before))
        same_shape = self._seen is None or before.shape[1:] == rows.shape[1:]
        differs = not same_shape or not torch.equal(rows[:common], before[:common])
        self.differs = self.differs or differs
        self._seen = rows if len(rows) > len(before) else before
        self.calls += 1

    def _total(self, native: Tensor, wide: Tensor, candidate: Tensor, scale: float) -> None:
        """Add up errors element by element, over the rows of a batch and over inputs."""
        if not scale:
            return
        finite = native.isfinite()
        own = torch.where(finite, native - wide, 0) / scale
        other = torch.where(finite, candidate - wide, 0) / scale
        if native.ndim:
            own, other = own.sum(0), other.sum(0)
        if self.own_total is None or self.other_total is None:
            self.own_total, self.other_total = torch.zeros_like(own), torch.zeros_like(other)
        if self.own_total.shape == own.shape:  # sizes beside the batch may vary between inputs
            self.own_total += own
            self.other_total += other
            self.rows += native.shape[0] if native.ndim else 1

    def keeps_digits(self, native: Tensor, wide: Tensor) -> bool:
        """Say whether the reference is about as exact on this input as on those before."""
        usual = [s.reference / s.scale for s in self.sums if s.scale]
        if self.exact or self.problem or not usual or _mismatch(native, wide, native):
            return False
        here = _sums(native, wide, native, unit(self.dtype))
        # Where squares of the output vanish, so may terms on the way to it.
        if here.scale**2 < torch.finfo(torch.float32).tiny:
            return False
        return here.reference / here.scale <= 4 * max(statistics.median(usual), unit(self.dtype))

    @property
    def varies(self) -> bool:
        """Whether the output depends on the input, or may do so where there was one input only."""
        return self.differs or self.calls < 2

    @property
    def exact(self) -> bool:
        """Whether this output is compared bit by bit."""
        return not (self.dtype.is_floating_point or self.dtype.is_complex)


def _mismatch(native: Tensor, wide: Tensor, candidate: Tensor) -> str:
    """Return what differs beyond numbers, or what cannot be compared; "" where nothing does."""
    if candidate.shape != native.shape:
        return f"shape {tuple(candidate.shape)} instead of {tuple(native.shape)}"
    if candidate.dtype != native.dtype:
        return f"dtype {_name(candidate.dtype)} instead of {_name(native.dtype)}"
    if wide.shape != native.shape:
        return f"the reference's shape is another one in float64: {tuple(wide.shape)}"
    if not (native.is_floating_point() or native.is_complex()):
        return ""
    nan = int(candidate.isnan().sum())
    if native.isnan().any():
        return "the reference itself returns NaN" + (", as the candidate does" if nan else "")
    if nan:
        return f"{nan} of {candidate.numel()} values are NaN"
    infinite = ~native.isfinite()
    if not torch.equal(infinite, ~candidate.isfinite()):
        return "infinite where the reference is finite, or the other way round"
    if not torch.equal(native[infinite], candidate[infinite]):
        return "infinities of the other sign"
    if not wide[~infinite].isfinite().all():
        return "the float64 run of the reference is not finite where its own run is"
    return ""


def _sums(native: Tensor, wide: Tensor, candidate: Tensor, eps: float) -> Sums:
    finite = native.isfinite()
    exact = _real(wide[finite])
    own = (_real(native[finite]) - exact).abs()
    other = (_real(candidate[finite]) - exact).abs()
    scale = _rms(exact)
    if not exact.numel():
        return Sums(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    # Below this an error is no error: the spacing of numbers around the element.
    spacing = eps * (exact.abs() + 2**-8 * scale) + torch.finfo(torch.float64).tiny
    return Sums(
        count=exact.numel(),
        scale=scale,
        peak=float(exact.abs().max()),
        reference=_rms(own),
        candidate=_rms(other),
        reference_max=float(own.max()),
        candidate_max=float(other.max()),
        reference_log=float((own + spacing).log().mean()),
        candidate_log=float((other + spacing).log().mean()),
    )


def _real(values: Tensor) -> Tensor:
    wide = values.to(torch.complex128 if values.is_complex() else torch.float64)
    return torch.view_as_real(wide).flatten() if wide.is_complex() else wide.flatten()


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Ratio:
    """A candidate's error in multiples of the reference's own.

    Attributes:
        kind: "rmse", "max", "typical" or "mean"; see `Gate`.
        value: the ratio.
        limit: the most that is rounding.
    """

    kind: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the ratio is within its limit."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Errors:
    """What the gate decides on, for one output.

    Attributes:
        reference: relative root-mean-square error of the reference in its own dtype.
        candidate: that of the candidate.
        ratios: the four ratios; an own error below the floor counts as the floor.
    """

    reference: float
    candidate: float
    ratios: tuple[Ratio, ...]


def _scales(sums: list[Sums]) -> list[float]:
    """Return the size of the output on each input.

    Few values tell little of it: a single one may be near zero by chance. The size on the other
    inputs counts as eight values more, in a geometric mean, since sizes may be of any order.
    """
    usual = math.log(statistics.median([s.scale for s in sums if s.scale] or [1.0]))
    return [
        math.exp((s.count * math.log(s.scale) + 8 * usual) / (s.count + 8) if s.scale else usual)
        for s in sums
    ]


def errors(tally: Tally, gate: Gate) -> Errors | None:
    """Return the pooled errors of a floating output, or None where nothing was compared."""
    sums = [s for s in tally.sums if s.count]
    if not sums:
        return None
    scales = _scales(sums)

    def pooled(values: list[float]) -> float:
        relative = [v / s for v, s in zip(values, scales, strict=True)]
        return math.sqrt(sum(r * r for r in relative) / len(relative))

    def worst(values: list[float]) -> float:
        return max(v / s for v, s in zip(values, scales, strict=True))

    def ratio(
        kind: str, own: float, other: float, limit: float, count: int, peak: float = 1.0
    ) -> Ratio:
        limit = widened(limit, count)
        # Rounding is relative to the element: that of the largest is `peak` times the usual one.
        floor = gate.floor * unit(tally.dtype) * peak
        return Ratio(kind, other / max(own, floor / limit), limit)

    own, other = pooled([s.reference for s in sums]), pooled([s.candidate for s in sums])
    own_max = worst([s.reference_max for s in sums])
    other_max = worst([s.candidate_max for s in sums])
    logs = [s.candidate_log - s.reference_log for s in sums]
    ratios = [
        ratio("rmse", own, other, gate.rmse, tally.count),
        ratio(
            "max",
            own_max,
            other_max,
            gate.maximum,
            tally.count,
            max(1.0, worst([s.peak for s in sums])),
        ),
        # The logarithm of one normal error spreads by 1.1, that of a ratio of two by 1.6.
        Ratio("typical", math.exp(sum(logs) / len(logs)), widened(gate.typical, tally.count, 1.6)),
    ]
    own_total, other_total = tally.own_total, tally.other_total
    if own_total is not None and other_total is not None and own_total.numel() >= _FEWEST:
        own_mean = _rms(_real(own_total)) / tally.rows
        other_mean = _rms(_real(other_total)) / tally.rows
        ratios.append(ratio("mean", own_mean, other_mean, gate.mean, own_total.numel()))
    return Errors(own, other, tuple(ratios))
