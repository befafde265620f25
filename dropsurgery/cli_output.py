"""What commands print: results for people, JSON for machines, progress on stderr."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from dropsurgery.compute import Compute
from dropsurgery.passes.base import Result
from dropsurgery.report import census, json_text, skips_text
from dropsurgery.tables import render

if TYPE_CHECKING:
    from rich.console import Console

DONE, DIFFERENT, FAILED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def verdict_code(verdict: Any) -> int:
    """Return the exit code for a verdict, or for None where there was none to be had."""
    return DONE if verdict is None or verdict.ok else DIFFERENT


def tell_result(
    result: Result,
    output: Path | None,
    model: str,
    every: bool,
    as_json: bool,
    cost: Compute | None = None,
    report: Path | None = None,
) -> int:
    """Print what passes did and what they left alone, and return the exit code.

    Args:
        result: the outcome of the passes.
        output: the folder that the surgery was saved in, if it was.
        model: what the user knows the network as.
        every: list what was left alone one by one.
        as_json: print JSON.
        cost: what dropping saves, where it was asked for.
        report: where a report was written, if one was.
    """
    counts = census(result.module)
    if as_json:
        directory = None if output is None else str(output)
        changes = [(c.by, c.module, c.node, c.what) for c in result.changes]
        skipped = [(s.by, s.module, s.node, s.reason) for s in result.skipped]
        document: dict[str, Any] = {
            "changes": _records(("pass", "module", "node", "what"), changes),
            "skipped": _records(("pass", "module", "node", "reason"), skipped),
        }
        if cost is not None:
            document["compute"] = asdict(cost)
        return print_json({"model": model, "directory": directory, **document, **vars(counts)})
    # What was done names its module; the table of what was not needs the place as well.
    passes = {change.by for change in result.changes}
    alone = len(passes) == 1
    title = f"{model}: {len(result.changes)} changes" + (f" by {min(passes)}" if alone else "")
    told = [(change.by, change.what)[alone:] for change in result.changes]
    echo(render(("pass", "what")[alone:], told, title=title, width=width()))
    if result.skipped:
        title = f"{len(result.skipped)} left alone"
        echo("\n" + skips_text(result.skipped, width(), title=title, every=every))
    echo(f"\n{counts}")
    if cost is not None:
        echo(f"\n{cost.text(width())}")
    if output is not None:
        echo(f"saved in {output}; in Python: net = dropsurgery.load({str(output)!r}, model)")
    tell_report(report)
    return DONE


def tell_report(path: Path | None) -> None:
    """Say where a report was written, if one was."""
    if path is not None:
        echo(f"report in {path}")


def _records(keys: Sequence[str], rows: Sequence[Sequence[object]]) -> list[dict[str, object]]:
    return [dict(zip(keys, row, strict=True)) for row in rows]


def width() -> int:
    """The terminal's columns, or COLUMNS; wide where the output is a file or a pipe."""
    return max(shutil.get_terminal_size((160, 24)).columns, 40)


def echo(text: str) -> None:
    """Print a line, or stop in silence where nobody reads any more."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has seen enough; the interpreter must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(DONE) from None


def print_json(document: Any, code: int = DONE) -> int:
    """Print one JSON document, and return the exit code."""
    echo(json_text(document))
    return code


def stderr() -> Console:
    """Return a console on stderr, where progress goes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner on stderr, and keep what models and libraries print off stdout.

    Gives a function that says more of how far the work is.
    """
    with contextlib.redirect_stdout(sys.stderr), stderr().status(escape(what)) as status:
        yield lambda more: status.update(escape(f"{what}: {more}"))
