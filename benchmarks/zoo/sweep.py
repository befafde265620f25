"""The rows of all models: each in a process of its own, one at a time, kept for the next time."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import multiprocessing
import platform
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.zoo.catalogue import Entry
from benchmarks.zoo.checks import Row, check

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# What a row depends on: the parts of the library that it calls and what asks the questions.
USED = ("errors.py", "survival.py", "surgery.py", "layers/*.py", "graph/**/*.py", "passes/**/*.py")
LIBRARY = sorted(path for pattern in USED for path in (ROOT / "dropsurgery").glob(pattern))
SOURCES = (
    *LIBRARY,
    *(HERE / name for name in ("catalogue.py", "checks.py", "oracle.py")),
)
PACKAGES = ("torch", "torchvision", "timm", "dropsurgery")


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Return what the results were made with.

    Args:
        more: packages beside those of every sweep.
    """
    names = (*PACKAGES, *more)
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def fingerprint(structure_only: bool) -> str:
    """Return a digest of everything that a row depends on."""
    return digest_of([versions(), structure_only], SOURCES)


def digest_of(facts: object, sources: Iterable[Path]) -> str:
    """Return a digest of facts that JSON can hold and of the text of files."""
    digest = hashlib.sha256(json.dumps(facts).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(
    models: Iterable[Entry],
    cache: Path,
    *,
    structure_only: bool = False,
    timeout: float = 300.0,
    fresh: bool = False,
    kept: Mapping[str, Row] | None = None,
) -> list[Row]:
    """Check all models and return their rows; rows that `cache` holds are not made again.

    Args:
        models: what to check.
        cache: folder of the rows; a row of other sources or versions is made anew.
        structure_only: leave out what runs a network.
        timeout: seconds after which a model is given up; the row says so.
        fresh: make all rows anew.
        kept: earlier rows by label. A model whose sites, rates and option are what they were is not
            run again, and keeps what running it showed then; its row says so.
    """
    if kept is not None:
        models = list(models)
        found = run(models, cache.with_name("structure"), structure_only=True, timeout=timeout)
        mark = fingerprint(structure_only=False)
        again = [
            m
            for m, row in zip(models, found, strict=True)
            if not _as_was(row, kept, m) or _cached(_path(cache, m), mark) is not None
        ]
        new = run(again, cache, timeout=timeout, fresh=fresh)
        made = {entry.label: row for entry, row in zip(again, new, strict=True)}
        return [
            made.get(m.label) or {**row, "run": kept[m.label]["run"], "kept": True}
            for m, row in zip(models, found, strict=True)
        ]
    work = partial(check, structure_only=structure_only)
    mark = fingerprint(structure_only)
    return rows_of(models, cache, work, mark, timeout=timeout, fresh=fresh)


def rows_of(
    models: Iterable[Entry],
    cache: Path,
    work: Callable[[Entry], Row],
    mark: str,
    *,
    timeout: float = 300.0,
    fresh: bool = False,
) -> list[Row]:
    """Let a function make one row of each model, in a process of its own, or take it from a cache.

    Args:
        models: what to make rows of.
        cache: folder of the rows; a row with another mark is made anew.
        work: what makes a row; a function that can be pickled, whose rows have a "status".
        mark: stands for everything that a row depends on.
        timeout: seconds after which a model is given up; the row says so.
        fresh: make all rows anew.
    """
    cache.mkdir(parents=True, exist_ok=True)
    # The server imports torch, torchvision and timm once; every model is a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.zoo.checks", "benchmarks.zoo.preload"])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    rows = []
    models = list(models)
    with Progress(*columns) as progress:
        task = progress.add_task("zoo", total=len(models))
        for entry in models:
            progress.update(task, description=f"{entry.label:44}")
            path = _path(cache, entry)
            row = None if fresh else _cached(path, mark)
            if row is None:
                row = isolated(context, entry, work, timeout)
                row = {"source": entry.source, "family": entry.family, "name": entry.name, **row}
                row["fingerprint"] = mark
                if row["status"] in ("ok", "error"):  # what took too long may be tried again
                    path.write_text(json.dumps(row))
            rows.append(row)
            progress.advance(task)
    return rows


def _path(cache: Path, entry: Entry) -> Path:
    return cache / f"{entry.source}-{entry.name}.json"


def _as_was(row: Row, kept: Mapping[str, Row], entry: Entry) -> bool:
    """Say whether a model's structure is what it was when it was run."""
    before = kept.get(entry.label, {})
    same = all(row.get(key) == before.get(key) for key in ("traced", "sites", "blocks"))
    names = ("default", "best", "option", "rules", "rates")
    now, then = row.get("oracle", {}), before.get("oracle", {})
    return "run" in before and same and all(now.get(name) == then.get(name) for name in names)


def matching(models: Iterable[Entry], pattern: str | None) -> list[Entry]:
    """Return the models whose label, name or family matches a pattern (a part of it will do)."""
    return [
        entry
        for entry in models
        if pattern is None
        or any(
            fnmatch.fnmatchcase(text, pattern) or text == pattern
            for text in (entry.label, entry.name, entry.family)
        )
    ]


def _cached(path: Path, mark: str) -> Row | None:
    if not path.is_file():
        return None
    row: Row = json.loads(path.read_text())
    return row if row.get("fingerprint") == mark else None


def isolated(
    context: multiprocessing.context.ForkServerContext,
    entry: Entry,
    work: Callable[[Entry], Row],
    timeout: float,
) -> Row:
    """Make the row of one model in a process of its own; of one that fails, status and error."""
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(writer, entry, work))
    process.start()
    writer.close()
    try:
        if not reader.poll(timeout):
            return {"status": "timeout", "error": f"not done after {timeout:.0f} s"}
        row: Row = reader.recv()
        return row
    except EOFError:
        process.join()
        return {"status": "crash", "error": f"exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        reader.close()


def _child(writer: Connection, entry: Entry, work: Callable[[Entry], Row]) -> None:
    writer.send(work(entry))
    writer.close()
