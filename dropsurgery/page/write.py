"""Pages as files: HTML that needs nothing else, Markdown and JSON, by the file's suffix."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from dropsurgery.errors import ArgumentError, DropsurgeryError
from dropsurgery.page.content import Page
from dropsurgery.page.story import Story
from dropsurgery.report import Table, json_text, write_whole
from dropsurgery.tables import NOTHING, printable

SUFFIXES = (".html", ".md", ".json")
# Longer tables are folded in HTML.
_FOLDED = 12
# Cells of more letters get room for a line; those of fewer are kept on one.
_LONG, _SHORT = 36, 18
_NUMBER = re.compile(r"[-+]?[\d,.]+(e[-+]?\d+)?( ?%| kB| MB| GB| bytes)?|nan|inf")


def check_page_target(path: Path) -> Path:
    """Fail before the work rather than after it, where a page cannot be written.

    Raises:
        ArgumentError: the suffix is none that a page has.
        DropsurgeryError: what HTML needs is not installed, or the folder does not exist.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(
            f"{path.name} is no report", fix=f"a name that ends in {', '.join(SUFFIXES)}"
        )
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if path.suffix.lower() == ".html" and missing:
        raise DropsurgeryError(
            f"a report in HTML needs {' and '.join(missing)}",
            fix="pip install 'dropsurgery[report]', or a report in .md or .json",
        )
    if not path.parent.is_dir():
        raise DropsurgeryError(f"{path} cannot be written: there is no such folder")
    return path


def write_page(path: Path, story: Story) -> Path:
    """Write a page as HTML, Markdown or JSON, whole or not at all.

    Raises:
        ArgumentError, DropsurgeryError: as `check_page_target`, or the file cannot be written.
    """
    suffix = check_page_target(path).suffix.lower()
    page = story.page(figures=suffix == ".html")
    if suffix == ".json":
        return write_whole(path, json_text(page.to_json()) + "\n")
    content = page.markdown() if suffix == ".md" else html(page)
    # A lone surrogate is no text that a file can hold.
    return write_whole(path, content.encode("utf-8", "replace"))


def html(page: Page) -> str:
    """Return the page as one HTML document without anything outside it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("dropsurgery.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    environment.globals.update(
        alignments=alignments,
        folded=lambda table: len(table.rows) > _FOLDED,
        # Drawn by us: every text in it was escaped by what drew it.
        drawing=lambda figure: Markup(figure.svg),
        style=Markup(environment.loader.get_source(environment, "page.css")[0]),  # type: ignore[union-attr]
    )
    return environment.get_template("page.html").render(page=page)


def alignments(table: Table) -> list[str]:
    """Return the kind of each column: "number", "text", "text short" or "text long"."""
    return [_kind([str(cell) for cell in column]) for column in zip(*table.rows, strict=True)]


def _kind(cells: list[str]) -> str:
    told = [cell for cell in cells if cell != NOTHING]
    if told and all(_NUMBER.fullmatch(cell) for cell in told):
        return "number"
    letters = max(map(len, told), default=0)
    return "text long" if letters > _LONG else "text short" if letters <= _SHORT else "text"
