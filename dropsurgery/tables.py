"""Plain-text tables, drawn by rich, which is imported only when a table is printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_GAP, _SMALL_GAP = 3, 2  # columns of text between two columns of the table
_NARROWEST = 12  # no column is folded to less
NOTHING = "-"  # a cell without a number in a column of numbers


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
        rows: one sequence of cells per row; numbers are aligned to the right. Where the widest
            column has to give way, module paths in it are folded after a dot.
        title: a line above the table.
        caption: a line below it.
        width: the most columns of text that the table may take.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    body = [tuple(row) for row in rows]
    lines, gap = _fitted(columns, [[_cell(value) for value in row] for row in body], width)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1) if gap == _GAP else (0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for index, name in enumerate(columns):
        cells = [row[index] for row in body]
        numbers = [isinstance(cell, int | float) for cell in cells if cell != NOTHING]
        numeric = bool(numbers) and all(numbers)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        if title:
            console.print(Text(title))
        if body:
            console.print(table)
        if caption:
            console.print(Text(caption))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def printable(text: object) -> str:
    """Return text without what moves a cursor or hides letters; line ends stay.

    A name in a file from elsewhere may hold control characters of a terminal, or Unicode that turns
    the direction of writing.
    """
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(text))


def _fitted(
    columns: Sequence[str], body: list[list[str]], width: int
) -> tuple[list[list[str]], int]:
    """Return rows and a gap that fit: narrower gaps, then the widest column's names folded."""
    widths = [max(map(len, column)) for column in zip(columns, *body, strict=True)]
    gaps = len(widths) - 1
    if sum(widths) + _GAP * gaps <= width:
        return body, _GAP
    excess = max(sum(widths) + _SMALL_GAP * gaps - width, 0)
    widest = max(range(len(widths)), key=widths.__getitem__)
    room = max(widths[widest] - excess, _NARROWEST)
    rows = [
        [_folded(cell, room) if index == widest else cell for index, cell in enumerate(row)]
        for row in body
    ]
    return rows, _SMALL_GAP


def _folded(cell: str, room: int) -> str:
    return " ".join(_folded_word(word, room) for word in cell.split(" "))


def _folded_word(word: str, room: int) -> str:
    lines = []
    while len(word) > room and (end := word.rfind(".", 1, room) + 1):
        lines.append(word[:end])
        word = word[end:]
    return "\n".join([*lines, word])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
