"""The plots of a page, drawn by matplotlib for both colour schemes and for readers without eyes."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from dropsurgery.errors import DropsurgeryError
from dropsurgery.page.content import Figure
from dropsurgery.tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that nothing else has: the page's own take their place, and so follow its scheme.
_INK, _LINE, _FIRST, _SECOND = "#010101", "#020202", "#030303", "#040404"
_THEME = {_INK: "currentColor", _LINE: "var(--line)", _FIRST: "var(--a)", _SECOND: "var(--b)"}
_WIDTH = 5.0  # inches: on a phone the letters are still large enough
_MOST_TYPES = 12
_SETTINGS: dict[Any, Any] = {
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",
    "text.parse_math": False,  # a path may hold dollars
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}


def survival_figure(points: Sequence[tuple[str, float]]) -> Figure:
    """Draw the survival probability of each drop path, from the input to the output."""
    values = [value for _, value in points]
    low = min(values)

    def draw(axes: Axes) -> None:
        numbers = range(1, len(values) + 1)
        axes.plot(numbers, values, color=_FIRST, marker="o", markersize=4, linewidth=1.5)
        axes.set_xlabel("drop path, from input to output")
        axes.set_ylabel("survival probability")
        axes.set_ylim(max(0.0, low - 0.1 * (1.02 - low) - 0.01), 1.02)
        _whole_numbers(axes, len(values))

    described = (
        f"Survival falls from {values[0]:.4g} at {points[0][0]} to {values[-1]:.4g} at "
        f"{points[-1][0]}; the least is {low:.4g}."
        if len(points) > 1
        else f"Survival is {low:.4g} at {points[0][0]}."
    )
    return _figure("survival", "Survival probability along the depth", described, draw, 2.4)


def types_figure(
    before: Mapping[str, int], after: Mapping[str, int], names: tuple[str, str]
) -> Figure:
    """Draw how many nodes of each type two graphs hold; the types that changed most come first."""
    kinds = sorted(
        {*before, *after},
        key=lambda kind: (
            -abs(after.get(kind, 0) - before.get(kind, 0)),
            -max(before.get(kind, 0), after.get(kind, 0)),
            kind,
        ),
    )
    shown = kinds[:_MOST_TYPES]
    left = len(kinds) - len(shown)

    def draw(axes: Axes) -> None:
        for offset, counts, name, color in (
            (-0.2, before, names[0], _SECOND),
            (0.2, after, names[1], _FIRST),
        ):
            places = [index + offset for index in range(len(shown))]
            widths = [counts.get(kind, 0) for kind in shown]
            bars = axes.barh(places, widths, 0.36, color=color, label=_short(name, 24))
            axes.bar_label(bars, padding=2, fontsize=8, color=_INK)
        axes.set_yticks(range(len(shown)), [_short(kind, 22) for kind in shown])
        axes.invert_yaxis()
        axes.set_xlabel("nodes")
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        _legend(axes)

    changes = [
        f"{kind} {before.get(kind, 0)} to {after.get(kind, 0)}"
        for kind in kinds
        if before.get(kind, 0) != after.get(kind, 0)
    ]
    described = f"From {names[0]} to {names[1]}: {'; '.join(changes)}." if changes else (
        f"{names[0]} and {names[1]} hold the same nodes."
    )  # fmt: skip
    caption = "Nodes by type" + (f"; {left} more types are in the table" if left else "")
    return _figure("types", caption, described, draw, 0.9 + 0.36 * len(shown))


def errors_figure(errors: Sequence[tuple[str, float, float]]) -> Figure:
    """Draw local and accumulated error along the depth, on a logarithmic scale."""
    worst = max(range(len(errors)), key=lambda index: _or_most(errors[index][1]))

    def draw(axes: Axes) -> None:
        numbers = range(1, len(errors) + 1)
        series = (
            ("accumulated", [row[2] for row in errors], _SECOND, "--", "s"),
            # No line: between two modules there is nothing, and many add no error at all.
            ("local", [row[1] for row in errors], _FIRST, "none", "o"),
        )
        for name, column, color, style, marker in series:
            values = [_positive(value) for value in column]
            axes.plot(
                numbers, values, color=color, linestyle=style, marker=marker, markersize=3.5,
                linewidth=1.5, label=name,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel("module, from input to output")
        axes.set_ylabel("relative error")
        axes.axvline(worst + 1, color=_INK, linewidth=0.8, linestyle=":")
        _whole_numbers(axes, len(errors))
        _legend(axes)

    path, local, accumulated = errors[worst]
    described = (
        f"The largest local error is {local:.3g}, at {path or 'the root'} (module {worst + 1} of "
        f"{len(errors)}), where {accumulated:.3g} has accumulated; {errors[-1][2]:.3g} at the end."
    )
    caption = "Error along the depth; the dotted line is at the largest local error"
    return _figure("errors", caption, described, draw, 2.6)


def _or_most(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _positive(value: float) -> float:
    return value if math.isfinite(value) and value > 0 else math.nan


def _short(text: str, letters: int) -> str:
    text = printable(text)
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def _whole_numbers(axes: Axes, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    margin = max(0.5, 0.02 * count)
    axes.set_xlim(1 - margin, count + margin)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _figure(name: str, caption: str, described: str, draw: Any, height: float) -> Figure:
    try:
        import matplotlib
    except ImportError as error:
        raise DropsurgeryError(
            "the plots of a report need matplotlib", fix="pip install 'dropsurgery[report]'"
        ) from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    buffer = io.StringIO()
    with matplotlib.rc_context(), any_letters():
        matplotlib.rcdefaults()  # the picture does not depend on a matplotlibrc
        matplotlib.rcParams.update({**_SETTINGS, "svg.hashsalt": name})
        drawing = Drawing(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasAgg(drawing)
        draw(drawing.add_subplot())
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Figure(caption, described, inline_svg(buffer.getvalue(), name, caption, described))


@contextlib.contextmanager
def any_letters() -> Iterator[None]:
    """Keep quiet about letters that matplotlib's font lacks: the page's reader has fonts too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        yield


def inline_svg(svg: str, name: str, title: str, described: str) -> str:
    """Return a drawing of matplotlib as it may stand in an HTML page.

    Its ids are made the drawing's own, or go where nothing refers to them. What refers to other
    places (the DTD, the metadata, the namespaces that HTML has by itself) goes, and the page's
    colours take the place of ours.

    Args:
        svg: the file's content.
        name: what its ids begin with.
        title, described: for readers who do not see it.
    """
    svg = printable(svg[svg.index("<svg") :])
    svg = re.sub(
        r"<metadata>.*?</metadata>|<title>.*?</title>|<desc>.*?</desc>", "", svg, flags=re.S
    )
    svg = re.sub(r"<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: [^;\"]*?(\d+(?:\.\d+)?px)[^;\"]*", r"font-size: \1", svg)
    for ours, theirs in _THEME.items():
        svg = svg.replace(ours, theirs)
    told = f"<title>{escape(printable(title))}</title><desc>{escape(printable(described))}</desc>"
    head, rest = svg.split(">", 1)
    head = re.sub(r'\srole="[^"]*"', "", head)
    return f'{head} role="img">{told}{rest}'
