"""Plain-text tables, drawn by rich, which is imported only when a table is printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def render(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    caption: str | None = None,
    width: int = 120,
) -> str:
    """Return a table as text without colour.

    Args:
        columns: the headings.
        rows: one sequence of cells per row; numbers are aligned to the right.
        title: a line above the table.
        caption: a line below it.
        width: the most columns of text that the table may take.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    body = [tuple(row) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=True)
    for index, name in enumerate(columns):
        numeric = bool(body) and all(isinstance(row[index], int | float) for row in body)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in body:
        table.add_row(*(Text(_cell(value)) for value in row))
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        if title:
            console.print(Text(title))
        if body:
            console.print(table)
        if caption:
            console.print(Text(caption))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
