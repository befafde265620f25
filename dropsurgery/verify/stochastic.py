"""Random networks: means and variances of many runs, within standard errors.

For each element of an output, and for a few sums over all elements, the runs of the reference and
of the candidate are two samples. Their means and their variances are compared by Welch's t-test.
Sums see what single elements do not: draws that are shared where they should be independent, and
shifts that are too small for one element. The limit is Bonferroni's for all tests of a comparison,
so that two networks of the same distribution part once in `1 / ALPHA` comparisons at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

# Chance of a false alarm in one comparison.
ALPHA = 1e-6
_SUMS = 4


@dataclass(frozen=True)
class Statistics:
    """One output of two random networks over many runs.

    Attributes:
        runs: runs of each network for each input.
        tests: tests that the limit is corrected for, those of other outputs among them.
        mean: the largest difference of means, in standard errors.
        variance: the largest difference of variances, in standard errors.
        limit: the most standard errors that are chance.
        seen: the least shift of one element that would be seen, in its standard deviations.
    """

    runs: int
    tests: int
    mean: float
    variance: float
    limit: float
    seen: float

    @property
    def ok(self) -> bool:
        """Whether both differences are within the limit."""
        return max(self.mean, self.variance) <= self.limit


@dataclass
class Moments:
    """Central moments of each element over runs, updated run by run (Pébay 2008).

    Attributes:
        count: runs.
        mean: mean of each element.
        second, third, fourth: sums of powers of deviations from the mean.
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    second: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    third: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    fourth: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Count one run in."""
        n = self.count + 1
        delta = values.to(torch.float64) - self.mean
        step = delta / n
        term = delta * step * self.count
        self.fourth = (
            self.fourth
            + term * step.square() * (n * n - 3 * n + 3)
            + 6 * step.square() * self.second
            - 4 * step * self.third
        )
        self.third = self.third + term * step * (n - 2) - 3 * step * self.second
        self.second = self.second + term
        self.mean = self.mean + step
        self.count = n

    @property
    def variance(self) -> Tensor:
        """Variance of each element, over count - 1."""
        return self.second / (self.count - 1)

    @property
    def variance_of_squares(self) -> Tensor:
        """Variance of the squared deviations of each element."""
        n = self.count
        return ((self.fourth - self.second.square() / n) / (n - 1)).clamp(min=0)


@dataclass
class Samples:
    """The runs of both networks on one input, for one output.

    Attributes:
        shape: the output's shape.
        reference, candidate: moments of its elements, followed by those of the sums.
        problem: what no statistics cover.
    """

    shape: tuple[int, ...]
    eps: float
    reference: Moments = field(default_factory=Moments)
    candidate: Moments = field(default_factory=Moments)
    problem: str = ""

    @classmethod
    def of(cls, output: Tensor) -> Samples:
        """Return empty samples for an output like this one."""
        floating = output.is_floating_point() or output.is_complex()
        return cls(tuple(output.shape), torch.finfo(output.dtype).eps if floating else 0.0)

    def add(self, reference: Tensor, candidate: Tensor, label: str) -> None:
        """Count in one run of each."""
        if self.problem:
            return
        if reference.dtype != candidate.dtype:
            self.problem = f"dtype {_name(candidate)} instead of {_name(reference)} ({label})"
            return
        for tensor, moments, role in (
            (reference, self.reference, "reference"),
            (candidate, self.candidate, "candidate"),
        ):
            if tuple(tensor.shape) != self.shape:
                self.problem = f"shape {tuple(tensor.shape)} instead of {self.shape} ({label})"
            elif not tensor.isfinite().all():
                self.problem = f"the {role} returns values that are not finite ({label})"
            else:
                moments.add(_with_sums(tensor))

    @property
    def tests(self) -> int:
        """How many tests are made of it."""
        return 2 * self.reference.mean.numel()

    def differences(self) -> tuple[float, float]:
        """Return the largest difference of means, and of variances, in standard errors."""
        one, other = self.reference, self.candidate
        n = one.count
        scale = one.mean.abs() + one.variance.sqrt()
        floor = 16 * self.eps * (scale + _rms(scale))
        mean = (one.mean - other.mean).abs()
        of_mean = ((one.variance + other.variance) / n + floor.square()).sqrt()
        variance = (one.variance - other.variance).abs()
        of_variance = (one.variance_of_squares + other.variance_of_squares) / n
        small = floor * (floor + (one.variance + other.variance).sqrt())
        of_variance = (of_variance + small.square()).sqrt()
        return _largest(mean / of_mean), _largest(variance / of_variance)

    def varies(self) -> tuple[bool, bool]:
        """Return whether the reference varies from run to run, and whether the candidate does."""
        return bool(self.reference.second.any()), bool(self.candidate.second.any())


def _with_sums(tensor: Tensor) -> Tensor:
    values = tensor.detach().flatten()
    values = torch.view_as_real(values).flatten() if values.is_complex() else values
    values = values.to(torch.float64)
    generator = torch.Generator().manual_seed(0)  # the same signs in every run
    sums = [values.sum()]
    for _ in range(_SUMS - 1):
        signs = torch.randint(2, values.shape, generator=generator, dtype=torch.int8)
        sums.append((values * (2 * signs - 1)).sum())
    return torch.cat([values, torch.stack(sums) / max(1, values.numel()) ** 0.5])


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num(0.0).max()) if values.numel() else 0.0


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def limit(tests: int, runs: int) -> float:
    """Return the most standard errors that are chance, for all tests together at `ALPHA`.

    Student's quantile for runs - 1 degrees of freedom, the fewest that Welch's test has, by the
    first terms of its expansion around the normal one (Abramowitz and Stegun 26.7.5).
    """
    z = NormalDist().inv_cdf(1 - ALPHA / (2 * max(1, tests)))
    free = runs - 1
    return (
        z
        + (z**3 + z) / (4 * free)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    )


def weigh(samples: list[Samples], tests: int) -> tuple[Statistics | None, str]:
    """Return the statistics of one output over all inputs, and why it does not pass, or "".

    Args:
        samples: one entry for each input.
        tests: how many tests the whole comparison makes.
    """
    problem = next((s.problem for s in samples if s.problem), "")
    counted = [s for s in samples if not s.problem and s.reference.count > 1]
    if not counted:
        return None, problem or "nothing was compared"
    runs = counted[0].reference.count
    most = limit(tests, runs)
    pairs = [s.differences() for s in counted]
    found = Statistics(
        runs=runs,
        tests=tests,
        mean=max(mean for mean, _ in pairs),
        variance=max(variance for _, variance in pairs),
        limit=most,
        seen=most * math.sqrt(2 / runs),
    )
    return found, problem or _frozen(counted) or _beyond(found)


def _frozen(samples: list[Samples]) -> str:
    varying = [s.varies() for s in samples]
    if any(one and not other for one, other in varying):
        return (
            "frozen: the reference varies from run to run and the candidate returns the same; "
            "its draws are constants, or left out"
        )
    if any(other and not one for one, other in varying):
        return "the candidate varies from run to run and the reference returns the same"
    return ""


def _beyond(found: Statistics) -> str:
    over = [
        f"{what} differ by {value:.3g} > {found.limit:.3g} standard errors"
        for what, value in (("means", found.mean), ("variances", found.variance))
        if value > found.limit
    ]
    return "another distribution: " + ", ".join(over) if over else ""
