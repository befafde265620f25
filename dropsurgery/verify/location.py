"""Where a candidate and a network part, for people and for machines."""

from __future__ import annotations

import dataclasses
import os
import textwrap
from dataclasses import dataclass
from typing import IO, Any

from dropsurgery.tables import render
from dropsurgery.verify.depth_plot import save_depth

_LEGEND = (
    "local: error of the piece on torch's own input, relative to its output; "
    "x limit: worst ratio to torch's own error, over what rounding may be; "
    "accumulated: error on the file's own input"
)
# Rows that are shown before and behind the place.
_AROUND = 6


@dataclass(frozen=True)
class Step:
    """One value that both sides have, and the piece of the candidate that computes it.

    Attributes:
        module: dotted path of the module that computes it ("" is the root).
        node: name of the candidate's node.
        op: its type.
        value: name of the candidate's value.
        torch: the network's module and operation that return the same.
        shape: the value's shape in the network.
        local: relative root-mean-square error against float64 where the piece is fed torch's own
            input.
        local_own: that of torch.
        ratio: the worst of the ratios of `Gate` over its limit; above 1 it is no rounding.
        accumulated: the error where the piece is fed what the candidate computed before.
        accumulated_own: that of torch.
        reason: what is wrong; "" where nothing is.
    """

    module: str
    node: str
    op: str
    value: str
    torch: str
    shape: tuple[int, ...]
    local: float = 0.0
    local_own: float = 0.0
    ratio: float = 0.0
    accumulated: float = 0.0
    accumulated_own: float = 0.0
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the piece computes what the network does, but for rounding."""
        return not self.reason


@dataclass(frozen=True)
class Location:
    """The first place at which a candidate and a network part. True in a condition if there is one.

    Attributes:
        found: whether there is such a place.
        module: dotted path of the module.
        step: the piece, or None.
        reason: what is wrong there; without a place, what is wrong elsewhere (onnxruntime's
            optimiser).
        case: the input that showed it.
        steps: all values that were compared, in order of execution.
        notes: what a reader should know.
    """

    found: bool
    module: str
    step: Step | None
    reason: str
    case: str
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.found

    @property
    def conclusion(self) -> str:
        """The place in words, as it is printed."""
        if self.step is None:
            text = f"no place: all {len(self.steps)} values agree, each computed from torch's own"
            return f"{text}; {self.reason}" if self.reason else text
        step, place = self.step, self.module or "the root module"
        text = f"first differs at {place} ({step.op} node '{step.node}')"
        if step.local_own > 0:
            text += f": local error {step.local:.2g}, torch's own {step.local_own:.2g}"
        return f"{text}; {self.reason}"

    def __str__(self) -> str:
        return self.table(120)

    def table(self, width: int) -> str:
        """Return the steps around the place, and the place, as text of at most `width` columns."""
        index = self.steps.index(self.step) if self.step in self.steps else 0
        shown = self.steps[max(index - _AROUND, 0) : index + _AROUND + 1]
        rows = [
            (
                step.module or "(root)",
                step.op,
                "x".join(map(str, step.shape)) or "scalar",
                f"{step.local:.2g}",
                f"{step.ratio:.2g}",
                f"{step.accumulated:.2g}",
                "" if step.ok else "differs",
            )
            for step in shown
        ]
        columns = ("module", "op", "shape", "local", "x limit", "accumulated", "")
        lines = (
            [f"values {self.steps.index(shown[0]) + 1} to … of {len(self.steps)}"] if rows else []
        )
        lines += [render(columns, rows, width=width), _LEGEND] if rows else []
        lines += [f"input: {self.case}", *(f"note: {note}" for note in self.notes), self.conclusion]
        return "\n".join(
            textwrap.fill(line, width, subsequent_indent="  ") if len(line) > width else line
            for text in lines
            for line in text.splitlines()
        )

    def plot(self, target: str | os.PathLike[str] | IO[bytes]) -> None:
        """Draw the errors along the depth, with the place marked, and write the picture.

        Args:
            target: a file, whose suffix decides the format (svg, png, pdf), or a binary file
                object, which gets SVG.

        Raises:
            DropsurgeryError: matplotlib is not installed, there is nothing to draw, or the file
                cannot be written.
        """
        save_depth(self, target)

    def to_json(self) -> dict[str, Any]:
        """Return the place as plain data for `json.dumps`; infinities as None."""
        document = {"conclusion": self.conclusion, **dataclasses.asdict(self)}
        finite: dict[str, Any] = _finite(document)
        return finite


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
