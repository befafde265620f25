"""What is known of a network, and the page that tells it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import fx

from dropsurgery.compute import Compute
from dropsurgery.graph.drops import is_drop_path, rate
from dropsurgery.graph.module import Skip, called_module, graphs
from dropsurgery.inspection import Inspection
from dropsurgery.onnx_reader import read_onnx
from dropsurgery.page.content import Figure, Page, Section
from dropsurgery.page.figures import (
    any_letters,
    errors_figure,
    inline_svg,
    survival_figure,
    types_figure,
)
from dropsurgery.passes.base import Change
from dropsurgery.provenance import RecordCheck
from dropsurgery.report import Table, environment
from dropsurgery.skeleton import description, picture
from dropsurgery.tables import NOTHING, printable
from dropsurgery.verify import OutputVerdict, Verdict


@dataclass(frozen=True)
class GraphCount:
    """A graph by the types of its nodes.

    Attributes:
        name: what the reader knows it as.
        types: how many nodes of each type it holds, without inputs and outputs.
    """

    name: str
    types: Mapping[str, int]

    @property
    def nodes(self) -> int:
        """All of them."""
        return sum(self.types.values())


@dataclass(frozen=True)
class Story:
    """What a run found. What is empty was not asked for, and the page says so at its end.

    Attributes:
        subject: the model or file, as the user named it.
        command: what was run.
        changes: what passes did.
        skipped: what they left alone.
        graphs: of networks, before first; two of them are compared.
        operators: of an ONNX file.
        survival: (path, survival probability) of each drop path, from input to output.
        inspection: the residual sites; drawn as a skeleton.
        compute: what dropping saves.
        verdict: of a comparison.
        errors: (module path, local error, accumulated error) from input to output, relative.
        place: where the file and the network part, in words.
        latency: (what, median milliseconds of a call), in the order in which they were built.
        latency_note: what was called, on what.
        sizes: (what, bytes).
        record: what a file says of itself.
    """

    subject: str
    command: str
    changes: tuple[Change, ...] = ()
    skipped: tuple[Skip, ...] = ()
    graphs: tuple[GraphCount, ...] = ()
    operators: GraphCount | None = None
    survival: tuple[tuple[str, float], ...] = ()
    inspection: Inspection | None = None
    compute: Compute | None = None
    verdict: Verdict | None = None
    errors: tuple[tuple[str, float, float], ...] = ()
    place: str = ""
    latency: tuple[tuple[str, float], ...] = ()
    latency_note: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    record: RecordCheck | None = None

    @property
    def good(self) -> bool | None:
        """Whether the outcome is one to be glad of; None where there is nothing to judge."""
        return self._status()[1]

    def page(self, *, figures: bool = True) -> Page:
        """Return the page; without figures nothing is drawn, and matplotlib is not needed."""
        parts = [
            _verdict(self),
            _record(self),
            _changes(self),
            _skipped(self),
            _survival(self, figures),
            _graphs(self, figures),
            _errors(self, figures),
            _measured(self),
            _compute(self),
            _versions(),
        ]
        sections = [part for part in parts if isinstance(part, Section)]
        missing = tuple(part for part in parts if not isinstance(part, Section))
        if missing:
            sections.append(Section("Not in this report", "missing", facts=missing))
        status, good = self._status()
        return Page(
            title=printable(self.subject),
            status=status,
            good=good,
            lead=f"{self._lead()}.",
            sections=tuple(sections),
            facts=self._facts(),
        )

    def _status(self) -> tuple[str, bool | None]:
        if self.verdict is not None:
            return self.verdict.conclusion, self.verdict.ok and self.verdict.tested
        if self.record is not None:
            return self.record.conclusion, self.record.equivalent
        by = " by slim" if self.command == "report" else ""
        if self.changes:
            return _plural(len(self.changes), "change") + by, None
        return f"nothing to change{by}", None

    def _lead(self) -> str:
        """Return what happened, in one sentence."""
        told = [f"Written by dropsurgery {self.command}"]
        if self.changes or self.skipped:
            told.append(f"{_plural(len(self.changes), 'change')}, {len(self.skipped)} left alone")
        if len(self.graphs) > 1:
            first, last = self.graphs[0], self.graphs[-1]
            told.append(f"{first.nodes} nodes before, {last.nodes} after")
        return ". ".join(told)

    def _facts(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "subject": self.subject,
            "changes": [asdict(change) for change in self.changes],
            "skipped": [asdict(skip) for skip in self.skipped],
            "graphs": [{"name": g.name, "types": dict(g.types)} for g in self.graphs],
            "operators": None if self.operators is None else dict(self.operators.types),
            "survival": [{"path": path, "survival": value} for path, value in self.survival],
            "inspection": None if self.inspection is None else self.inspection.to_json(),
            "compute": None if self.compute is None else asdict(self.compute),
            "verdict": None if self.verdict is None else self.verdict.to_json(),
            "errors": [
                {"module": path, "local": local, "accumulated": accumulated}
                for path, local, accumulated in self.errors
            ],
            "place": self.place,
            "latency_ms": dict(self.latency),
            "bytes": dict(self.sizes),
            "record": None if self.record is None else self.record.to_json(),
            "environment": environment(),
        }


# --- counting ------------------------------------------------------------------------------------


def node_types(module: fx.GraphModule) -> dict[str, int]:
    """Count the operations of a traced network (its eval graph) by layer class or function."""
    kinds: Counter[str] = Counter()
    for node in module.graph.nodes:
        layer = called_module(module, node)
        if layer is not None:
            kinds[type(layer).__name__] += 1
        elif node.op == "call_function":
            kinds[getattr(node.target, "__name__", str(node.target))] += 1
        elif node.op == "call_method":
            kinds[f".{node.target}"] += 1
        elif node.op == "get_attr":
            kinds["get_attr"] += 1
    return dict(kinds.most_common())


def onnx_types(path: Path) -> dict[str, int]:
    """Count the nodes of an ONNX file's main graph by operator."""
    return dict(Counter(node.op_type for node in read_onnx(path).model.graph.node).most_common())


def survival_along(module: fx.GraphModule) -> tuple[tuple[str, float], ...]:
    """Return (path, survival probability) of the drop paths of a traced network, in order."""
    points = []
    for node in graphs(module)[-1].nodes:
        layer = called_module(module, node)
        if layer is not None and is_drop_path(layer):
            points.append((str(node.target), 1.0 - rate(layer)))
    return tuple(points)


# --- sections ------------------------------------------------------------------------------------

Missing = tuple[str, str]


def _verdict(story: Story) -> Section | Missing:
    verdict = story.verdict
    if verdict is None:
        return "Verdict", "no file was compared with a network"
    kinds = list(dict.fromkeys(r.kind for output in verdict.outputs for r in output.ratios))
    rows = [
        (
            output.name,
            output.dtype,
            "x".join(map(str, output.shape)) or "scalar",
            NOTHING if output.reference_error is None else f"{output.reference_error:.3g}",
            NOTHING if output.candidate_error is None else f"{output.candidate_error:.3g}",
            *_ratios(output, kinds),
            "equal" if output.ok else f"differs: {output.reason}",
        )
        for output in verdict.outputs
    ]
    columns = ("output", "dtype", "shape", "own error", "error", *kinds, "verdict")
    told = [("inputs", "; ".join(verdict.inputs))]
    told += [("problem", problem) for problem in verdict.problems]
    told += [("note", note) for note in verdict.notes]
    return Section(
        "Verdict",
        "verdict",
        lead=f"{verdict.conclusion}: {Path(verdict.candidate).name} against {verdict.reference}, "
        f"on {verdict.provider}, with {_plural(len(verdict.inputs), 'input')}.",
        facts=tuple(told),
        tables=(
            Table(
                "Outputs",
                columns,
                tuple(rows),
                "Own error: of the network against its float64 run, relative to the output. Error: "
                "of the candidate. Then the ratio of the two, measured in several ways, each with "
                "its limit.",
            ),
        ),
    )


def _ratios(output: OutputVerdict, kinds: Sequence[str]) -> Iterator[str]:
    ratios = {ratio.kind: f"{ratio.value:.3g} / {ratio.limit:.2g}" for ratio in output.ratios}
    return (ratios.get(kind, NOTHING) for kind in kinds)


def _record(story: Story) -> Section | Missing:
    check = story.record
    if check is None:
        return "Record", "no record of a verdict was read from a file or written into one"
    rows = tuple((f.part, "as recorded" if f.ok else "CHANGED", f.detail) for f in check.findings)
    return Section(
        "Record in the file",
        "record",
        lead=f"{check.conclusion}. A record finds accidents and edits; only a signed one "
        "withstands somebody who writes all of it anew.",
        tables=(Table("What was checked", ("part", "", "detail"), rows),),
        text=printable(check.record.get("verdict", {}).get("text", "")),
    )


def _changes(story: Story) -> Section | Missing:
    if not story.changes:
        return "Changes", "no pass changed anything"
    by = Counter(change.by for change in story.changes)
    rows = tuple((c.module or "(root)", c.node, c.by, c.what) for c in story.changes)
    return Section(
        "What slim does" if story.command == "report" else "What was done",
        "changes",
        lead=f"{_plural(len(rows), 'change')}: "
        + ", ".join(f"{count} by {name}" for name, count in by.most_common())
        + ".",
        tables=(Table("Changes by module", ("module", "node", "pass", "what"), rows),),
    )


def _skipped(story: Story) -> Section | Missing:
    if not story.skipped:
        return "Left alone", "nothing was left alone"
    rows = tuple((s.module or "(root)", s.node, s.by, s.reason) for s in story.skipped)
    return Section(
        "What was left alone",
        "skipped",
        lead=f"{len(rows)} left alone, each for the reason beside it.",
        tables=(Table("Left alone by module", ("module", "node", "pass", "reason"), rows),),
    )


def _survival(story: Story, figures: bool) -> Section | Missing:
    found, points = story.inspection, story.survival
    if found is not None and not points:
        points = tuple(
            (rate.site.module or "(root)", rate.survival)
            for rate in found.sites
            if rate.survival is not None
        )
    if not points:
        return "Survival probabilities", "the network has no drop paths"
    drawn = [survival_figure(points)] if figures else []
    if figures and found is not None and found.sites:
        told = description(found)
        with any_letters():
            svg = picture(found, "svg").decode()
        title = f"Residual skeleton of {found.name}"
        drawn.append(
            Figure("Residual skeleton", told, inline_svg(svg, "skeleton", title, told), paper=True)
        )
    values = [value for _, value in points]
    return Section(
        "Survival along the depth",
        "survival",
        lead=f"{_plural(len(points), 'drop path')}, survival {max(values):.4g} to "
        f"{min(values):.4g}." + (f" {found.headline}, {found.rule}." if found is not None else ""),
        tables=(
            Table(
                "Survival by drop path",
                ("#", "module", "survival", "drop"),
                tuple(
                    (index, path, f"{value:.4g}", f"{1 - value:.4g}")
                    for index, (path, value) in enumerate(points, 1)
                ),
            ),
        ),
        figures=tuple(drawn),
    )


def _graphs(story: Story, figures: bool) -> Section | Missing:
    tables, drawn = [], []
    if story.graphs:
        kinds = dict.fromkeys(kind for graph in story.graphs for kind in graph.types)
        rows = [(kind, *(graph.types.get(kind, 0) for graph in story.graphs)) for kind in kinds]
        rows.append(("all", *(graph.nodes for graph in story.graphs)))
        columns = ("type", *(graph.name for graph in story.graphs))
        tables.append(Table("Nodes by type", columns, tuple(rows)))
    if figures and len(story.graphs) > 1:
        first, last = story.graphs[0], story.graphs[-1]
        drawn.append(types_figure(first.types, last.types, (first.name, last.name)))
    if story.operators is not None:
        rows = [*story.operators.types.items(), ("all", story.operators.nodes)]
        tables.append(
            Table(f"Operators of {story.operators.name}", ("operator", "nodes"), tuple(rows))
        )
    if not tables:
        return "Graph", "no graph was looked at"
    counted = [*story.graphs, *([story.operators] if story.operators else [])]
    return Section(
        "Graph before and after" if len(story.graphs) > 1 else "Graph",
        "graph",
        lead=", ".join(f"{printable(g.name)}: {_plural(g.nodes, 'node')}" for g in counted) + ".",
        tables=tuple(tables),
        figures=tuple(drawn),
    )


def _errors(story: Story, figures: bool) -> Section | Missing:
    if not story.errors:
        return "Error along the depth", "the intermediate values were not compared"
    rows = tuple(
        (index, path or "(root)", f"{local:.3g}", f"{accumulated:.3g}")
        for index, (path, local, accumulated) in enumerate(story.errors, 1)
    )
    columns = ("#", "module", "local", "accumulated")
    drawn = errors_figure(story.errors) if figures else None
    return Section(
        "Error along the depth",
        "errors",
        lead=(f"{story.place[:1].upper()}{story.place[1:]}. " if story.place else "")
        + "Local: the module's own error, where it is fed what the network computes. Accumulated: "
        "with what the modules before it passed on. Both are relative to the values compared.",
        tables=(Table("Error by module", columns, rows),),
        figures=(drawn,) if drawn is not None else (),
    )


def _measured(story: Story) -> Section | Missing:
    if not story.latency and not story.sizes:
        return "Latency and size", "nothing was timed"
    tables = []
    if story.latency:
        first = story.latency[0][1]
        rows = tuple((name, f"{ms:.3g}", f"{first / ms:.2f}") for name, ms in story.latency)
        tables.append(
            Table("Latency", ("what", "median ms", "times as fast"), rows, story.latency_note)
        )
    if story.sizes:
        sizes = tuple((name, _size(count), f"{count:,}") for name, count in story.sizes)
        tables.append(Table("Size", ("what", "size", "bytes"), sizes))
    return Section("Latency and size", "measured", tables=tuple(tables))


def _compute(story: Story) -> Section | Missing:
    cost = story.compute
    if cost is None:
        return "Expected compute", "no batch size was given to count it for"
    rows = tuple(
        (s.path, s.mode, f"{s.survival:.4g}", f"{s.flops / 1e6:,.1f}", f"{s.run:.1%}", s.reason)
        for s in cost.sites
    )
    columns = ("drop path", "mode", "survival", "branch MFLOP", "run", "")
    return Section(
        "Expected compute",
        "compute",
        lead=f"A forward of batch {cost.batch} takes {cost.total / 1e9:,.3f} GFLOP, and "
        f"{cost.expected / 1e9:,.3f} in expectation when training: {1 - cost.ratio:.1%} less.",
        tables=(Table("Branches", columns, rows),),
    )


def _versions() -> Section:
    facts = tuple((name, str(value)) for name, value in environment().items())
    return Section("Versions", "versions", facts=facts)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
