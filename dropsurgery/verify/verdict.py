"""What a comparison found, for people and for machines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dropsurgery.tables import render
from dropsurgery.verify.gate import Gate, Ratio

KINDS = ("rmse", "max", "typical", "mean")


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

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        table = render(
            ("output", "dtype", "shape", "own error", "error", *KINDS, "verdict"),
            [_row(output) for output in self.outputs],
            title=f"{self.candidate} against {self.reference} on {self.provider}",
            caption="own error: of the reference against its float64 run, relative to the output; "
            "error: of the candidate; then ratio/limit",
        )
        lines = [table, f"inputs: {'; '.join(self.inputs)}"]
        lines += [f"problem: {problem}" for problem in self.problems]
        lines += [f"{o.name}: {o.reason}" for o in self.outputs if o.reason]
        lines += [f"note: {note}" for note in self.notes]
        lines.append("EQUIVALENT" if self.ok else "NOT EQUIVALENT")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as plain data for `json.dumps`."""
        return dataclasses.asdict(self)


def _row(output: OutputVerdict) -> tuple[str, ...]:
    errors = (output.reference_error, output.candidate_error)
    ratios = {ratio.kind: f"{ratio.value:.3g}/{ratio.limit:.2g}" for ratio in output.ratios}
    return (
        output.name,
        output.dtype,
        "x".join(map(str, output.shape)) or "scalar",
        *("-" if error is None else f"{error:.3g}" for error in errors),
        *(ratios.get(kind, "-") for kind in KINDS),
        "ok" if output.ok else "differs",
    )
