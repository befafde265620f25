"""Taking conversions of dropout back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import fx

from dropsurgery.graph.inventory import Drop
from dropsurgery.passes.conversion import Conversion, log_of, tags_of, write_log
from dropsurgery.passes.edits import (
    AddedLayer,
    ChangedCall,
    ErasedCall,
    RemovedLayer,
    ScaledWeight,
    SetAttributes,
    SwappedLayer,
)


def undoable(module: fx.GraphModule, chosen: Callable[[Drop], bool]) -> Iterator[tuple[int, str]]:
    """Yield the numbers of conversions in the log, last first, and why one has to stay, or ""."""
    log = log_of(module)
    tags = set(tags_of(module))
    paths = {path for path, _ in module.named_modules(remove_duplicate=False)}
    kept: set[str] = set()
    for number in reversed(range(len(log))):
        conversion = log[number]
        touched = _touched(conversion)
        if not chosen(conversion.drop):
            kept |= touched
            continue
        back_tags, back_paths = _returned(conversion)
        missing = [
            need
            for edit in conversion.edits
            for need in edit.needs()
            if need not in tags | back_tags
        ]
        gone = touched - paths - back_paths
        if touched & kept:
            yield number, "a later conversion of it was not chosen"
        elif missing or gone:
            yield number, "the graph around it has changed since"
        else:
            tags |= back_tags
            paths |= back_paths
            yield number, ""
            continue
        kept |= touched


def undo(module: fx.GraphModule, numbers: Sequence[int]) -> None:
    """Take conversions back: their numbers in the log, last one first."""
    log = log_of(module)
    tags = tags_of(module)
    for number in numbers:
        for edit in reversed(log[number].edits):
            edit.undo(module, tags)
    write_log(module, tuple(c for index, c in enumerate(log) if index not in set(numbers)))


def _touched(conversion: Conversion) -> set[str]:
    """Return the paths of the layers that must be there when a conversion is taken back."""
    found: set[str] = set()
    for edit in conversion.edits:
        if isinstance(edit, SwappedLayer):
            found |= set(edit.paths)
        elif isinstance(edit, AddedLayer | SetAttributes | ScaledWeight):
            found.add(edit.path)
        elif isinstance(edit, ErasedCall | ChangedCall) and edit.call.op == "call_module":
            found.add(str(edit.call.target))
    return found


def _returned(conversion: Conversion) -> tuple[set[tuple[int, int]], set[str]]:
    """Return the tags and paths that taking a conversion back brings back."""
    tags = {(edit.graph, edit.tag) for edit in conversion.edits if isinstance(edit, ErasedCall)}
    paths = {
        f"{parent}.{name}" if parent else name
        for edit in conversion.edits
        if isinstance(edit, RemovedLayer)
        for parent, name, _ in edit.places
    }
    return tags, paths
