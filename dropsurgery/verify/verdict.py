"""What a comparison found, for people and for machines."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dropsurgery.tables import render
from dropsurgery.verify.algebra import Algebra
from dropsurgery.verify.figures import Figures
from dropsurgery.verify.gate import Gate, Ratio
from dropsurgery.verify.stochastic import ALPHA, Statistics

KINDS = ("rmse", "max", "typical", "mean")

_UNBOUNDED = 10_000
_LEGEND = (
    "own error: of the reference against its float64 run, relative to the output; "
    "error: of the candidate; then ratio/limit"
)


@dataclass(frozen=True)
class OutputVerdict:
    """One output of the network.

    Attributes:
        name: its name.
        ok: whether it passed.
        dtype: its dtype.
        shape: its shape on the first input.
        count: elements compared, over all inputs.
        reference_error: relative root-mean-square error of the reference in its own dtype against
            its float64 run; None for integers and booleans.
        candidate_error: that of the candidate; for integers and booleans the share of elements
            that differ.
        ratios: candidate's error over the reference's, four ways, with their limits; see `Gate`.
        reason: why it did not pass; "" where it did.
        varies: whether it is another one for other inputs; if not, nothing before it was tested.
        algebra: the float64 run of a module candidate, or of the surgered network on the way to a
            file, against the reference's: the budget of surgery beside that of rounding. None
            where there is no such module, and for integers and booleans.
        figures: what other tools print; nothing is decided by them.
        statistics: of an output of random networks, which is decided by them alone.
    """

    name: str
    ok: bool
    dtype: str
    shape: tuple[int, ...]
    count: int
    reference_error: float | None
    candidate_error: float | None
    ratios: tuple[Ratio, ...]
    reason: str = ""
    varies: bool = True
    algebra: Algebra | None = None
    figures: Figures | None = None
    statistics: Statistics | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate computes what the reference computes. True in a condition if it does.

    Attributes:
        ok: whether every output passed on every input.
        reference: class of the reference.
        candidate: path or class of the candidate.
        provider: what ran the candidate.
        outputs: one entry for each output.
        problems: what is wrong apart from the numbers of one output: names, counts, failing runs.
        notes: what a reader should know of what was not, or could not be, tested.
        inputs: the inputs that were run, in words, with their seeds.
        gate: the limits.
        environment: versions of what computed, by name.
    """

    ok: bool
    reference: str
    candidate: str
    provider: str
    outputs: tuple[OutputVerdict, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    inputs: tuple[str, ...]
    gate: Gate
    environment: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def tested(self) -> bool:
        """Whether some output depends on the inputs; if none does, `ok` says next to nothing."""
        return any(output.varies for output in self.outputs)

    @property
    def conclusion(self) -> str:
        """The verdict in words, as it is printed."""
        if not self.ok:
            return "NOT EQUIVALENT"
        if not self.tested:
            return "EQUIVALENT, but the output is constant: nothing before it was tested"
        return "EQUIVALENT"

    def __str__(self) -> str:
        return "\n".join(self._lines(120))

    def table(self, width: int, *, figures: bool = False) -> str:
        """Return the verdict as text of at most `width` columns.

        Where the table of outputs is wider than that, the ratios get a table of their own.

        Args:
            width: columns of text.
            figures: add the figures that other tools print: top-1 agreement, signal to noise,
                those of `torch.testing.assert_close`.
        """
        return "\n".join(_wrapped(line, width) for line in self._lines(width, figures=figures))

    def _lines(self, width: int, *, figures: bool = False) -> list[str]:
        lines = [f"{self.candidate} against {self.reference} on {self.provider}"]
        lines += self._outputs(width).splitlines()
        drawn = any(output.statistics is not None for output in self.outputs)
        lines += [*self._statistics()] if drawn else [_LEGEND, *self._algebra()]
        lines += [f"inputs: {'; '.join(self.inputs)}"]
        if figures:
            lines += self._figures(width).splitlines()
        if self.environment:
            versions = ", ".join(f"{name} {value}" for name, value in self.environment.items())
            lines.append(f"with {versions}")
        lines += [f"problem: {problem}" for problem in self.problems]
        lines += [f"{o.name}: {o.reason}" for o in self.outputs if o.reason]
        lines += [f"note: {note}" for note in self.notes]
        # What makes the verdict worthless stands first as well as last.
        warning = [self.conclusion] if self.ok and not self.tested else []
        return [*warning, *lines, self.conclusion]

    def _outputs(self, width: int) -> str:
        facts, rows = ("output", "dtype", "shape", "own error", "error"), []
        for output in self.outputs:
            rows.append((*_facts(output), *_ratios(output), _word(output)))
        body = render((*facts, *KINDS, "verdict"), rows, width=_UNBOUNDED)
        if max(map(len, body.splitlines()), default=0) <= width:
            return body
        first = [(*_facts(output), _word(output)) for output in self.outputs]
        second = [(output.name, *_ratios(output)) for output in self.outputs]
        tables = (((*facts, "verdict"), first), (("output", *KINDS), second))
        return "\n\n".join(render(columns, cells, width=width) for columns, cells in tables)

    def _algebra(self) -> list[str]:
        lines = []
        for output in self.outputs:
            if (algebra := output.algebra) is not None:
                basis = f", new weights rounded to {algebra.rounded}" if algebra.rounded else ""
                sign = "<=" if algebra.ok else ">"
                lines.append(
                    f"algebra of {output.name}: {algebra.error:.2g} {sign} {algebra.limit:.2g} "
                    f"in float64{basis}"
                )
        return lines

    def _statistics(self) -> list[str]:
        lines = []
        for output in self.outputs:
            if (found := output.statistics) is not None:
                lines.append(
                    f"{output.name} over {found.runs} runs: means differ by {found.mean:.3g}, "
                    f"variances by {found.variance:.3g} standard errors; chance leaves "
                    f"{found.limit:.3g} ({found.tests} tests, Bonferroni at {ALPHA:.0e}); "
                    f"shifts of an element below {found.seen:.2g} standard deviations are not seen"
                )
        return lines

    def _figures(self, width: int) -> str:
        rows = [
            (
                output.name,
                "-" if f.top1 is None else f"{100 * f.top1:.4g} %",
                "same" if f.sqnr is None else f"{f.sqnr:.1f}",
                f"{f.max_abs:.3g}",
                f"{f.max_rel:.3g}",
                f"{100 * f.outside:.3g} %",
            )
            for output in self.outputs
            if (f := output.figures) is not None
        ]
        columns = ("output", "top-1", "SQNR dB", "max abs", "max rel", "outside assert_close")
        return render(columns, rows, width=width) if rows else ""

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as plain data for `json.dumps`."""
        return {
            "conclusion": self.conclusion,
            "tested": self.tested,
            **dataclasses.asdict(self),
        }


def _wrapped(text: str, width: int) -> str:
    # A line that fits, as those of the tables do, keeps its spaces.
    return textwrap.fill(text, width, subsequent_indent="  ") if len(text) > width else text


def _facts(output: OutputVerdict) -> tuple[str, ...]:
    errors = (output.reference_error, output.candidate_error)
    return (
        output.name,
        output.dtype,
        "x".join(map(str, output.shape)) or "scalar",
        *("-" if error is None else f"{error:.3g}" for error in errors),
    )


def _ratios(output: OutputVerdict) -> tuple[str, ...]:
    ratios = {ratio.kind: f"{ratio.value:.3g}/{ratio.limit:.2g}" for ratio in output.ratios}
    return tuple(ratios.get(kind, "-") for kind in KINDS)


def _word(output: OutputVerdict) -> str:
    return "ok" if output.ok else "differs"
