"""A picture of a network's residual skeleton: its skips along the depth, over their survival."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from dropsurgery.errors import DropsurgeryError
from dropsurgery.inspection import Inspection, SiteRate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Lengths are in inches, text in points.
_INCH_A_BLOCK, _NARROWEST, _WIDEST = 0.22, 8.0, 18.0
_LEFT, _RIGHT = 0.75, 0.3
_SKIPS, _RATES = 1.0, 1.9  # heights of the two panels; nested skips add to the first
_LEVEL = 0.24
_VALUE = 0.42  # room for a number
_DPI = 144

_INK, _PALE, _BAND, _BRANCH = "#222222", "#9a9a9a", "#f1f1f1", "#ffffff"
# Told apart by shape, by line and by colour; the colours differ in lightness too.
_STYLES: dict[str, dict[str, Any]] = {
    "identity": {"color": "#17457a", "linestyle": "-", "marker": "o"},
    "projection": {"color": "#d97706", "linestyle": (0, (3, 1)), "marker": "s"},
    "nested": {"color": "#8b2fa0", "linestyle": (0, (1, 1)), "marker": "D"},
}
_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "axes.linewidth": 0.8,
    "text.parse_math": False,  # a path may hold dollars
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dropsurgery",
}


@dataclass(frozen=True)
class _Place:
    """Where a site is drawn, in blocks along the depth: its skip from `left` to its add."""

    rate: SiteRate
    left: float
    right: float
    level: int

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2


def picture(found: Inspection, form: Literal["svg", "png"] | str) -> bytes:
    """Draw an inspection and return the file's content.

    Args:
        found: what to draw.
        form: "svg" (text stays text, with a title and a description for screen readers) or "png".

    Raises:
        DropsurgeryError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise DropsurgeryError(
            "drawing needs matplotlib", fix="pip install 'dropsurgery[plot]'"
        ) from error
    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the picture does not depend on a matplotlibrc
        matplotlib.rcParams.update(_SETTINGS)
        title = f"Residual skeleton of {found.name}"
        figure = draw(found)
        if form == "png":
            figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Title": title})
            return buffer.getvalue()
        figure.savefig(buffer, format="svg", metadata={"Title": title, "Date": None})
    described = f"</title>\n <desc>{escape(description(found))}</desc>"
    text = buffer.getvalue().decode().replace("</title>", described, 1)
    return text.replace("<svg ", '<svg role="img" ', 1).encode()


def description(found: Inspection) -> str:
    """Return the picture in words."""
    if not found.sites:
        return f"{found.headline}."
    stages = [f"{path} {last - first + 1}" for path, first, last in found.stages()]
    values = [rate.survival for rate in found.sites if rate.survival is not None]
    return (
        f"{found.headline}, {found.rule}. Blocks by stage: {', '.join(stages)}. Survival from "
        f"{values[0]:.4g} at the first to {values[-1]:.4g} at the last, {min(values):.4g} at least."
    )


def draw(found: Inspection) -> Figure:
    """Draw an inspection: on top the trunk with its blocks and skips, below the survival."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = min(max(found.blocks * _INCH_A_BLOCK + _LEFT + _RIGHT, _NARROWEST), _WIDEST)
    figure = Figure(figsize=(width, 4), facecolor="white")
    FigureCanvasAgg(figure)
    if not found.sites:
        return _draw_nothing(figure, found)
    places = list(_places(found))
    levels = max(place.level for place in places)
    heading = _heading(found, width)
    names, room = _stage_names(figure, found, width)
    top, bottom = 0.28 + 0.18 * heading.count("\n") + room, 0.78
    skips_height = _SKIPS + _LEVEL * levels
    height = top + skips_height + 0.12 + _RATES + bottom
    figure.set_size_inches(width, height)

    def panel(from_top: float, tall: float) -> Axes:
        below = (height - from_top - tall) / height
        axes = figure.add_axes((_LEFT / width, below, 1 - (_LEFT + _RIGHT) / width, tall / height))
        axes.set_xlim(0.5, found.blocks + 0.5)
        return axes

    skips, rates = panel(top, skips_height), panel(top + skips_height + 0.12, _RATES)
    block = (width - _LEFT - _RIGHT) / found.blocks
    _draw_stages(skips, rates, found)
    _draw_skips(skips, places, block, levels)
    _draw_rates(rates, places, block)
    _draw_depth(rates, found, block)
    for x, name, rotation in names:
        skips.annotate(
            name, (x, 1), (0, 4), ("data", "axes fraction"), textcoords="offset points",
            ha="center", va="bottom", rotation=rotation, color=_INK, gid="stage",
        )  # fmt: skip
    name, _, told = heading.partition("\n")
    for text, below, weight in ((name, 0.1, "bold"), (told, 0.29, "normal")):
        figure.text(
            _LEFT / width, 1 - below / height, text, va="top", color=_INK, weight=weight,
            linespacing=1.35, gid="heading",
        )  # fmt: skip
    _draw_legend(figure, places, width)
    return figure


def _draw_nothing(figure: Figure, found: Inspection) -> Figure:
    width, height = _NARROWEST, 1.6
    figure.set_size_inches(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.annotate("", (0.95, 0.25), (0.05, 0.25), arrowprops={"arrowstyle": "->", "color": _PALE})
    told = found.headline
    if found.skipped:
        told += f"\n({len(found.skipped)} adds are none, or may hide some)"
    axes.text(0.05, 0.9, _shortened(found.name, 90), va="top", weight="bold", color=_INK)
    axes.text(0.5, 0.5, told, ha="center", va="center", color=_INK, gid="nothing")
    return figure


# --- where things go -----------------------------------------------------------------------------


def _places(found: Inspection) -> Iterator[_Place]:
    """Give the adds of a block equal shares of it; a nested skip begins where its branch does."""
    slots: list[tuple[float, float]] = []
    for block, run in groupby(found.sites, key=lambda rate: rate.site.block):
        count = len(list(run))
        starts = [block - 0.5 + turn / count for turn in range(count)]
        slots += [(start, start + 1 / count) for start in starts]
    levels = _levels([rate.over for rate in found.sites])
    for index, rate in enumerate(found.sites):
        left, right = slots[index]
        margin = 0.12 * (right - left)
        begin = left if rate.over is None else slots[rate.over[0]][0]
        yield _Place(rate, begin + margin, right - margin, levels[index])


def _levels(spans: list[tuple[int, int] | None]) -> list[int]:
    """Return how high each skip goes: 0 for a plain one, above all that it meets for a nested."""
    levels = [0] * len(spans)
    nested = [(span[1] - span[0], index, span) for index, span in enumerate(spans) if span]
    placed: list[tuple[int, int, int]] = []
    for _, index, (first, last) in sorted(nested):
        met = [level for begin, end, level in placed if begin <= index and first <= end]
        levels[index] = 1 + max(met, default=0)
        placed.append((first, max(last, index), levels[index]))
    return levels


def _stage_names(
    figure: Figure, found: Inspection, width: float
) -> tuple[list[tuple[float, str, int]], float]:
    """Return (x, name, rotation) of the stage names that have room, and the inches they need.

    Names lie where each fits over its own stage; else all stand, and one that would touch the one
    before it is left out.
    """
    block = (width - _LEFT - _RIGHT) / found.blocks
    stages = [(_shortened(path, 28), first, last) for path, first, last in found.stages()]
    lengths = [_text_inches(figure, name) for name, _, _ in stages]
    rooms = [(last - first + 1) * block - 0.08 for _, first, last in stages]
    if all(length <= room for length, room in zip(lengths, rooms, strict=True)):
        return [((first + last) / 2, name, 0) for name, first, last in stages], 0.25
    standing: list[tuple[float, str, int]] = []
    for name, first, last in stages:
        x = (first + last) / 2
        if not standing or (x - standing[-1][0]) * block >= 0.17:
            standing.append((x, name, 90))
    return standing, max(lengths) + 0.12


def _text_inches(figure: Figure, text: str) -> float:
    drawn = figure.text(0, 0, text)
    extent = drawn.get_window_extent()
    drawn.remove()
    return float(extent.width / figure.dpi)


def _heading(found: Inspection, width: float) -> str:
    letters = int((width - _LEFT - _RIGHT) * 15)
    lines = [_shortened(found.name, letters)]
    lines += textwrap.wrap(f"{found.headline}; {found.rule}", letters, max_lines=3)
    return "\n".join(lines)


def _shortened(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"…{text[1 - letters :]}"


# --- drawing -------------------------------------------------------------------------------------


def _draw_stages(skips: Axes, rates: Axes, found: Inspection) -> None:
    several = len(found.sites) > found.blocks
    for axes in (skips, rates) if several else ():
        borders = [block + 0.5 for block in range(1, found.blocks)]
        axes.vlines(
            borders, 0, 1, transform=axes.get_xaxis_transform(), colors="#cfcfcf",
            linewidths=0.5, zorder=0.4, gid="blocks",
        )  # fmt: skip
    for index, (_, first, last) in enumerate(found.stages()):
        for axes in (skips, rates):
            if index % 2 == 0:
                axes.axvspan(first - 0.5, last + 0.5, color=_BAND, linewidth=0, zorder=0)
            if index:
                axes.axvline(first - 0.5, color=_PALE, linewidth=0.6, zorder=0.5)


def _draw_skips(axes: Axes, places: list[_Place], block: float, levels: int) -> None:
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.patches import Rectangle

    axes.axis("off")
    axes.set_ylim(-0.55, 1.35 + 0.45 * levels)
    axes.axhline(0, color=_INK, linewidth=1, zorder=1)
    own = [place for place in places if place.level == 0]
    narrowest = min((place.right - place.left for place in own), default=1.0) * block
    line = min(max(narrowest * 8, 0.7), 1.6)
    boxes = [
        Rectangle((p.left + 0.28 * (p.right - p.left), -0.3), 0.44 * (p.right - p.left), 0.6)
        for p in own
    ]
    edges = [_PALE if place.rate.survival is None else _INK for place in own]
    axes.add_collection(
        PatchCollection(
            boxes, facecolor=_BRANCH, edgecolor=edges, linewidth=line / 2, zorder=2, gid="branches"
        )
    )
    for kind, style in _STYLES.items():
        for chosen in (True, False):
            these = [p for p in places if _is(p, kind, chosen)]
            if not these:
                continue
            color = style["color"] if chosen else _PALE
            gid = f"{kind}-skips" if chosen else f"{kind}-skips-left-alone"
            axes.add_collection(
                LineCollection(
                    [_curve(place) for place in these], colors=color, linewidths=line,
                    linestyles=[style["linestyle"]], zorder=3, gid=gid,
                )
            )  # fmt: skip
            for linear in (True, False):
                adds = [p.right for p in these if p.rate.site.linear is linear]
                if adds:
                    axes.scatter(
                        adds, [0] * len(adds), s=min(max(narrowest * 18, 2.4), 6) ** 2,
                        marker=style["marker"], edgecolors=color, linewidths=line * 0.8,
                        facecolors="white" if linear else color, zorder=4,
                        gid=f"{kind}-adds{'-linear' if linear else ''}",
                    )  # fmt: skip


def _is(place: _Place, kind: str, chosen: bool) -> bool:
    return place.rate.site.kind == kind and (place.rate.survival is not None) is chosen


def _curve(place: _Place) -> list[tuple[float, float]]:
    """Return a skip's way over its branch: round where it is the identity, else with corners."""
    left, right, top = place.left, place.right, 1.0 + 0.45 * place.level
    if place.rate.site.kind == "identity":
        angles = [math.pi * (1 - index / 24) for index in range(25)]
        middle, half = (left + right) / 2, (right - left) / 2
        return [
            (middle + half * math.copysign(abs(math.cos(a)) ** 0.7, math.cos(a)),
             top * abs(math.sin(a)) ** 0.7)
            for a in angles
        ]  # fmt: skip
    slope = 0.1 * (right - left) if place.level == 0 else 0.1
    return [(left, 0), (left + slope, top), (right - slope, top), (right, 0)]


def _draw_rates(axes: Axes, places: list[_Place], block: float) -> None:
    chosen = [(_own(p), p.rate.survival) for p in places if p.rate.survival is not None]
    points = [((left + right) / 2, value) for (left, right), value in chosen]
    # The curve has a gap where a site is not chosen.
    curve = [(sum(_own(p)) / 2, math.nan if (s := p.rate.survival) is None else s) for p in places]
    native = [(sum(_own(p)) / 2, 1 - p.rate.native) for p in places if p.rate.native is not None]
    low = min((value for _, value in points + native), default=1.0)
    span = max(1 - low, 0.02)
    axes.set_ylim(max(low - 0.25 * span, -0.04), 1 + 0.1 * span)
    axes.bar(
        [x for x, _ in points], [value - 1 for _, value in points],
        [0.8 * (right - left) for (left, right), _ in chosen],
        bottom=1, color="#c9d8e8", linewidth=0, zorder=1, gid="drop-rates",
    )  # fmt: skip
    slot = min((right - left for (left, right), _ in chosen), default=1.0) * block
    size = min(max(slot * 20, 1.5), 5)
    axes.plot(
        *zip(*curve, strict=True), color=_INK, linewidth=1, marker="o", markersize=size, zorder=3,
        gid="survival",
    )  # fmt: skip
    if native:
        axes.plot(
            *zip(*native, strict=True), color="#c2410c", linestyle="", marker="x",
            markersize=size + 2, zorder=4, gid="native-survival",
        )  # fmt: skip
    for x, y, value, side in _told(places, block, 0.14 * span):
        axes.annotate(
            f"{value:.3g}", (x, y), (0, -6), textcoords="offset points", ha=side, va="top",
            fontsize=8, color=_INK, zorder=5, gid="value",
            bbox={"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip
    axes.set_ylabel("survival probability", color=_INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _told(places: list[_Place], block: float, near: float) -> list[tuple[float, float, float, str]]:
    """Return (x, y, survival, alignment) of the numbers: all where they have room, else two.

    Neighbours in a block that have one survival share a number, which stands under what the
    network was built with where that is `near`.
    """
    spots: list[tuple[float, float, float]] = []
    chosen = [place for place in places if place.rate.survival is not None]
    for (_, value), run in groupby(chosen, key=lambda p: (p.rate.site.block, p.rate.survival)):
        these, value = list(run), value or 0.0
        built = [1 - place.rate.native for place in these if place.rate.native is not None]
        y = min(value, *(native for native in built if value - native < near), value)
        spots.append(((_own(these[0])[0] + _own(these[-1])[1]) / 2, y, value))
    gaps = [right[0] - left[0] for left, right in itertools.pairwise(spots)]
    if all(gap * block >= _VALUE for gap in gaps):
        return [(*spot, "center") for spot in spots]
    return [(*spots[0], "left"), (*spots[-1], "right")]


def _own(place: _Place) -> tuple[float, float]:
    """Return the stretch of depth that is a site's own, wherever its skip begins."""
    if place.level == 0:
        return place.left, place.right
    return round(place.right) - 0.38, place.right


def _draw_depth(axes: Axes, found: Inspection, block: float) -> None:
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    step = next((step for step in steps if step * block >= 0.4), steps[-1])
    ticks = [1, *range(step, found.blocks + 1, step)] if step > 1 else range(1, found.blocks + 1)
    axes.set_xticks(sorted(set(ticks)))
    adds = {rate.site.add for rate in found.sites}
    each = {len(list(run)) for _, run in groupby(found.sites, key=lambda rate: rate.site.block)}
    told = f"{len(adds)} adds" if len(each) > 1 else f"{min(each)} adds each"
    axes.set_xlabel("residual block" if each == {1} else f"residual block ({told})", color=_INK)


def _draw_legend(figure: Figure, places: list[_Place], width: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Line2D | Patch] = []
    names = {"identity": "identity skip", "projection": "projection skip", "nested": "nested skip"}
    for kind, style in _STYLES.items():
        if any(place.rate.site.kind == kind for place in places):
            entries.append(Line2D([], [], label=names[kind], linewidth=1.4, markersize=5, **style))
    if any(place.rate.site.linear for place in places):
        entries.append(_mark("o", "linear branch", _INK, "white"))
    if any(place.rate.survival is None for place in places):
        entries.append(Line2D([], [], color=_PALE, linewidth=1.4, label="left alone"))
    entries.append(Patch(facecolor=_BRANCH, edgecolor=_INK, linewidth=0.8, label="branch"))
    entries.append(Line2D([], [], color=_INK, marker="o", markersize=4, label="survival"))
    entries.append(Patch(facecolor="#c9d8e8", label="drop rate"))
    if any(place.rate.native is not None for place in places):
        entries.append(_mark("x", "survival as built", "#c2410c", "#c2410c"))
    figure.legend(
        handles=entries, loc="lower left", bbox_to_anchor=(_LEFT / width, 0), frameon=False,
        ncols=min(len(entries), int((width - _LEFT) / 1.45)), fontsize=8, borderaxespad=0.3,
        columnspacing=1.4, handlelength=2.6, borderpad=0,
    )  # fmt: skip


def _mark(marker: str, label: str, edge: str, face: str) -> Line2D:
    from matplotlib.lines import Line2D as Line

    return Line([], [], linestyle="", marker=marker, label=label, color=edge, markerfacecolor=face)
