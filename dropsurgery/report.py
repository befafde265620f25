"""Results as text for a terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import fx, nn

from dropsurgery.errors import DropsurgeryError
from dropsurgery.graph.drops import is_drop_path
from dropsurgery.graph.leaves import FROZEN_BATCHNORMS, is_one_of
from dropsurgery.graph.module import Skip
from dropsurgery.layers import FollowTraining, GaussianDropout, ScaledDotProductAttention
from dropsurgery.onnx_reader import read_onnx
from dropsurgery.tables import printable, render


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: what it shows.
        columns: the headings; the first column names the row.
        rows: cells, strings already formatted or numbers.
        note: what a reader must know to read it rightly.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""

    def text(self, width: int = 100) -> str:
        """Return the table for a terminal of `width` columns."""
        return render(
            self.columns, self.rows, title=self.title, caption=self.note or None, width=width
        )

    def markdown(self) -> str:
        """Return the table as GitHub-flavoured Markdown."""
        return f"## {self.title}\n\n{self.markdown_rows()}"

    def markdown_rows(self) -> str:
        """Return the table as Markdown without its title."""
        lines = [_line(self.columns), _line(["---"] * len(self.columns))]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, "", as_text(self.note), ""] if self.note else [*lines, ""])


@dataclass(frozen=True)
class Report:
    """What a run found: tables for people, facts for machines.

    Attributes:
        title: the heading.
        summary: one paragraph.
        tables: in reading order.
        facts: the same numbers unformatted, as JSON values.
        appendix: text for the Markdown only, as it is.
    """

    title: str
    summary: str
    tables: tuple[Table, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    appendix: str = ""

    def text(self, width: int = 100) -> str:
        """Return the report for a terminal of `width` columns."""
        summary = textwrap.fill(self.summary, width)
        return "\n\n".join([*(table.text(width) for table in self.tables), summary])

    def markdown(self) -> str:
        """Return the report as Markdown."""
        parts = [f"# {self.title}", "", self.summary, "", *(t.markdown() for t in self.tables)]
        if self.appendix:
            parts += ["```text", self.appendix, "```", ""]
        return "\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return title, summary and facts as JSON values."""
        return {"title": self.title, "summary": self.summary, **self.facts}

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write `report.md` and `report.json` into `folder`, each whole or not at all."""
        return (
            write_whole(folder / "report.md", self.markdown()),
            write_whole(folder / "report.json", json_text(self.to_json()) + "\n"),
        )


@dataclass(frozen=True)
class Census:
    """What a graph holds.

    Attributes:
        nodes: its operations, inputs and outputs.
        batch_norms: calls of a BatchNorm, as module or function.
        dropouts: calls of a dropout, attention with dropout included.
        drop_paths: calls of a drop path (stochastic depth).
    """

    nodes: int
    batch_norms: int
    dropouts: int
    drop_paths: int

    def __str__(self) -> str:
        return (
            f"{self.nodes} nodes, {self.batch_norms} BatchNorms, {self.dropouts} dropouts, "
            f"{self.drop_paths} drop paths"
        )


def census(module: fx.GraphModule) -> Census:
    """Count what the graph of a traced network (its eval graph) calls."""
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    called = [module.get_submodule(str(node.target)) for node in calls]
    functions = [node.target for node in module.graph.nodes if node.op == "call_function"]
    functions += [layer.function for layer in called if isinstance(layer, FollowTraining)]
    norms = (nn.modules.batchnorm._BatchNorm,)
    return Census(
        nodes=len(module.graph.nodes),
        batch_norms=sum(isinstance(m, norms) or is_one_of(m, FROZEN_BATCHNORMS) for m in called)
        + sum(f in (nn.functional.batch_norm, torch.batch_norm) for f in functions),
        dropouts=sum(_drops_units(m) for m in called),
        drop_paths=sum(is_drop_path(m) for m in called),
    )


def _drops_units(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    if isinstance(module, ScaledDotProductAttention):
        return module.dropout_p > 0
    return isinstance(module, nn.modules.dropout._DropoutNd | GaussianDropout)


def onnx_census(path: Path) -> Census:
    """Count what an ONNX file's main graph holds; it has no drop paths of its own."""
    kinds = [node.op_type for node in read_onnx(path).model.graph.node]
    return Census(len(kinds), kinds.count("BatchNormalization"), kinds.count("Dropout"), 0)


# More skips than this are told by reason.
_FEW = 10


def skips_text(skips: Sequence[Skip], width: int, *, title: str, every: bool = False) -> str:
    """Return skips as a table or, where there are many, as a count and examples of each reason.

    Args:
        skips: what was left alone.
        width: the most columns of text.
        title: the line above.
        every: list each of them, however many there are.
    """
    if every or len(skips) <= _FEW:
        start = 0 if any(skip.by for skip in skips) else 1  # an analysis is no pass
        rows = [(s.by, s.module or "(root)", s.node, s.reason)[start:] for s in skips]
        columns = ("pass", "module", "node", "reason")[start:]
        return render(columns, rows, title=title, width=width)
    kinds: dict[tuple[str, str], list[Skip]] = {}
    for skip in skips:
        # The names in a reason are its own; what stands around them is the kind of reason.
        kinds.setdefault((skip.by, re.sub(r"'[^']*'", "'…'", skip.reason)), []).append(skip)
    lines = [title]
    for (by, reason), group in sorted(kinds.items(), key=lambda item: -len(item[1])):
        told = reason if len({skip.reason for skip in group}) > 1 else group[0].reason
        lines += _indented(f"{len(group):5}  {f'{by}: ' if by else ''}{told}", width)
        examples = "; ".join(f"{s.module or '(root)'} {s.node}" for s in group[:3])
        lines += _indented(f"{'':7}{examples}{'; …' if len(group) > 3 else ''}", width)
    return "\n".join([*lines, *_indented("--all lists each", width)])


def _indented(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=" " * 9, break_on_hyphens=False)


def environment(
    packages: Sequence[str] = ("dropsurgery", "torch", "onnx", "onnxruntime"),
) -> dict[str, Any]:
    """Return what measured numbers depend on: versions, processor, threads."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def medians_in_turns(
    first: Callable[[], object], second: Callable[[], object], repeats: int, warm_up: int = 10
) -> tuple[float, float]:
    """Time two calls side by side, so that a busy machine is unfair to neither; milliseconds."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + warm_up):
        for call, taken in zip((first, second), times, strict=True):
            began = time.perf_counter()
            call()
            if turn >= warm_up:
                taken.append((time.perf_counter() - began) * 1e3)
    return median(times[0]), median(times[1])


def json_text(document: Any) -> str:
    """Return a document as JSON; infinities and NaN, which JSON lacks, become null."""
    return json.dumps(finite(document), indent=2, allow_nan=False)


def finite(value: Any) -> Any:
    """Return a document with None in the place of infinities and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file, text as UTF-8, so that it is never seen half written.

    Raises:
        DropsurgeryError: the file cannot be written.
    """
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        part.write_bytes(content if isinstance(content, bytes) else content.encode())
        part.replace(path)
    except OSError as error:
        raise DropsurgeryError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(as_text(cell).replace("|", "\\|") for cell in cells) + " |"


def as_text(value: object) -> str:
    """Return a value as one line of Markdown, in which no name is HTML."""
    return " ".join(printable(value).split("\n")).replace("<", "&lt;")
