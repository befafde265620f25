"""The error of a file along the depth of the network, as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dropsurgery.errors import DropsurgeryError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dropsurgery.verify.location import Location

# A relative error of nothing has no place on a logarithmic axis; one without bound neither.
_LEAST, _MOST = 1e-10, 1e2
_LINES = (
    ("accumulated", "accumulated, from the file's own input", "-", "tab:orange"),
    ("local", "local, from torch's own input", "o", "tab:blue"),
    ("local_own", "torch's own", ".", "0.6"),
)
_NAMES = 24  # more names do not fit below the axis


def depth_figure(location: Location) -> Figure:
    """Draw the errors of all values in order of execution, and mark the place.

    Raises:
        DropsurgeryError: matplotlib is not installed, or no values were compared.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DropsurgeryError(
            "the plot needs matplotlib", fix="pip install 'dropsurgery[plot]'"
        ) from error
    steps = location.steps
    if not steps:
        raise DropsurgeryError("no values were compared: there is nothing to draw")
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes: Any = figure.subplots()
    depth = range(1, len(steps) + 1)
    for name, label, style, color in _LINES:
        values = [min(max(getattr(step, name), _LEAST), _MOST) for step in steps]
        axes.plot(depth, values, style, color=color, markersize=4, label=label)
    if location.step in steps:
        place = steps.index(location.step) + 1
        axes.axvline(place, color="tab:red", linewidth=1)
        where = location.module or "the root module"
        axes.set_title(f"first differs at {where}", loc="left", fontsize="medium")
    axes.set_yscale("log")
    axes.set_ylabel("error relative to the value")
    axes.set_xlabel("values in order of execution, by module")
    marks = list(range(0, len(steps), -(-len(steps) // _NAMES)))
    axes.set_xticks(
        [mark + 1 for mark in marks],
        [steps[mark].module or "(root)" for mark in marks],
        rotation=90,
        fontsize="x-small",
    )
    axes.grid(axis="y", color="0.9")
    axes.legend(fontsize="small")
    return figure


def save_depth(location: Location, target: str | os.PathLike[str] | IO[bytes]) -> None:
    """Draw and write; see `Location.plot`."""
    figure = depth_figure(location)
    kind = None if isinstance(target, str | os.PathLike) else "svg"
    try:
        figure.savefig(target, dpi=150, format=kind)
    except (OSError, ValueError) as error:
        name = Path(target) if isinstance(target, str | os.PathLike) else "the picture"
        raise DropsurgeryError(f"{name} cannot be written: {error}") from error
