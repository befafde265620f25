"""One output of a comparison: what is added up on each input, and what it comes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dropsurgery.verify.algebra import Algebra, AlgebraTally
from dropsurgery.verify.figures import FigureTally
from dropsurgery.verify.gate import Errors, Gate, Tally, errors, trust_limit
from dropsurgery.verify.stochastic import Samples, weigh
from dropsurgery.verify.verdict import OutputVerdict


@dataclass
class Record:
    """What is known of one output so far; its size does not grow with the number of inputs.

    Attributes:
        name: the output's name.
        shape: its shape on the first input.
        tally: its errors.
        figures: sums for the figures.
        algebra: differences of the float64 runs; None until some were added.
    """

    name: str
    shape: tuple[int, ...]
    tally: Tally
    figures: FigureTally = field(default_factory=FigureTally)
    algebra: AlgebraTally | None = None

    @classmethod
    def of(cls, name: str, native: Tensor) -> Record:
        """Return an empty record for an output like `native`."""
        return cls(name, tuple(native.shape), Tally(native.dtype))

    def add(self, native: Tensor, wide: Tensor, candidate: Tensor, label: str) -> None:
        """Compare the candidate's output on one input."""
        self.tally.add(native, wide, candidate, label)
        if not self.tally.exact and (native.shape, native.dtype) == (
            candidate.shape,
            candidate.dtype,
        ):
            self.figures.add(native, candidate)

    def add_algebra(self, exact: Tensor, other: Tensor, own: float, label: str) -> None:
        """Compare two float64 runs on one input; see `AlgebraTally.add`."""
        if self.algebra is None:
            self.algebra = AlgebraTally()
        self.algebra.add(exact, other, own, label)

    def judge(
        self,
        gate: Gate,
        *,
        dtypes: Iterable[torch.dtype],
        rounded: torch.dtype | None,
    ) -> OutputVerdict:
        """Weigh what was found.

        Args:
            gate: the limits.
            dtypes: of the reference's parameters.
            rounded: the coarsest dtype of weights that surgery made; see `AlgebraTally.weigh`.
        """
        tally = self.tally
        found = None if tally.exact else errors(tally, gate)
        share = tally.differing / tally.count if tally.count else 0.0
        algebra = self._algebra(rounded)
        reason = (
            tally.problem
            or _reason(tally, found, trust_limit({tally.dtype, *dtypes}))
            or _algebra_reason(algebra, self.algebra)
        )
        return OutputVerdict(
            name=self.name,
            ok=not reason,
            dtype=str(tally.dtype).removeprefix("torch."),
            shape=self.shape,
            count=tally.count,
            reference_error=found.reference if found else None,
            candidate_error=found.candidate if found else (share if tally.exact else None),
            ratios=found.ratios if found else (),
            reason=reason,
            varies=tally.varies,
            algebra=algebra,
            figures=self.figures.figures(),
        )

    def _algebra(self, rounded: torch.dtype | None) -> Algebra | None:
        if self.algebra is None or self.tally.exact:
            return None
        return self.algebra.weigh(self.tally.dtype, rounded)


def judge_samples(
    records: Mapping[str, Record], samples: Mapping[str, list[Samples]]
) -> tuple[OutputVerdict, ...]:
    """Weigh the runs of random networks, all outputs together."""
    tests = sum(s.tests for of_output in samples.values() for s in of_output)
    outputs = []
    for name, of_output in samples.items():
        found, reason = weigh(of_output, tests)
        outputs.append(
            OutputVerdict(
                name=name,
                ok=not reason,
                dtype=str(records[name].tally.dtype).removeprefix("torch."),
                shape=records[name].shape,
                count=sum(s.tests // 2 for s in of_output),
                reference_error=None,
                candidate_error=None,
                ratios=(),
                reason=reason,
                statistics=found,
            )
        )
    return tuple(outputs)


def _algebra_reason(algebra: Algebra | None, tally: AlgebraTally | None) -> str:
    if tally is not None and tally.problem:
        return tally.problem
    if algebra is None or algebra.ok:
        return ""
    return (
        f"not the same algebra: float64 against float64 differs by {algebra.error:.2g} of the "
        f"output > {algebra.limit:.2g}"
    )


def _reason(tally: Tally, found: Errors | None, limit: float) -> str:
    if tally.differing:
        return f"{tally.differing} of {tally.count} values differ"
    if not tally.count:
        return "" if tally.sums else "no values were compared"
    if found is None:
        return ""
    if found.reference > limit:
        return (
            f"the reference's own error is {found.reference:.2g} of the output: "
            "it computes too inexactly to be compared with"
        )
    over = [f"{r.kind} ratio {r.value:.3g} > {r.limit:.2g}" for r in found.ratios if not r.ok]
    return "error beyond rounding: " + ", ".join(over) if over else ""
