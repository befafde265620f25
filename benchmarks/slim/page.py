"""Rows as docs/slim.md: what was asked for and measured, then every model."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.markdown import table
from benchmarks.zoo import catalogue
from benchmarks.zoo.catalogue import META_ONLY, Entry

Row = dict[str, Any]

TOOLS_ONNX = ("export", "onnxslim", "onnxsim")
TOOLS = ("onnx", "onnxscript", "onnxslim", "onnxsim")
# BatchNorms that may be left in the ONNX file; None: as few as the algebra allows.
ASKED: dict[str, int | None] = {
    "levit_128s": 0,
    "visformer_tiny": 0,
    "fastvit_t8": 0,
    "repvgg_a0": 0,
    "xception41p": 8,
    "resnetv2_50": None,
    "densenet121": None,
    "convmixer_768_32": None,
}
EXACT = 1e-12
RELATIVE = 10.0  # of an error that the network itself makes of the rounding of its inputs
SHARE = 0.95
INTRODUCTION = f"""\
What `ds.slim` leaves of a network, beside what torch.fx's fuser
(`torch.fx.experimental.optimization.fuse`), timm's `reparameterize_model`, and, for the ONNX file,
`torch.onnx.export` with its defaults, onnxslim and onnxsim leave. Written by `make zoo`
(`python -m benchmarks.slim`); `slim.json` beside it holds the same for machines, with nodes,
parameters and times.

Every model has random BatchNorm statistics, gains in [0.5, 1.5] and biases, and is run in eval mode
at the smallest input that it takes. **BN** counts calls of a BatchNorm in the graph. **ours** is
`ds.slim(model, example_inputs=x)`; **signed**: the same with one gain in twenty negative, which a
ReLU lets through less easily. **error** is the largest difference to the original over the largest
value, both in float64; there are networks with random weights that magnify the rounding of their
inputs to more than that themselves. **ONNX** columns count nodes / BatchNormalization nodes. The
models are the smallest of each family and those that the project names; {META_ONLY // 10**6} M
parameters and more are left out, and models without a BatchNorm are told in the summary only.
"""
HEADER = (
    "model", "BN", "torch.fx", "timm", "ours", "signed", "error",
    "ONNX: export", "+ onnxslim", "+ onnxsim", "ours",
)  # fmt: skip


def entries() -> list[Entry]:
    """Return the smallest model of each family of the zoo, and those that the project names."""
    first: dict[tuple[str, str], Entry] = {}
    for entry in catalogue.entries():
        first.setdefault((entry.source, entry.family), entry)
    found = list(first.values())
    missing = set(ASKED) - {entry.name for entry in found if entry.source == "timm"}
    for family, names in catalogue.timm_families().items():
        found += [Entry("timm", family, name) for name in names if name in missing]
    return found


def joined(
    entries: Iterable[Entry], peers: Mapping[str, Row], ours: Mapping[str, Row]
) -> list[Row]:
    """Return one row a model from those of both sides."""
    rows = []
    for entry in entries:
        theirs, own = peers[entry.label], ours[entry.label]
        status = own["status"] if theirs["status"] == "ok" else theirs["status"]
        rows.append({**theirs, **own, "status": status})
    return rows


def write(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """Return the page."""
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    named = [row for row in rows if row["source"] == "timm" and row["name"] in ASKED]
    parts = [
        "# Slimmer networks",
        f"Written {datetime.date.today().isoformat()} with {made}.",
        INTRODUCTION,
        "## Summary",
        table(("", "asked", "measured"), _summary(rows)),
        "## The networks whose BatchNorms survive elsewhere",
        "BatchNorms left in the ONNX file.",
        table(("model", "export", "+ onnxslim", "+ onnxsim", "asked", "ours"), _named(named)),
        "## What is left, and why",
        *_left(rows),
        "## What failed",
        *_failures(rows),
    ]
    for source in ("timm", "torchvision"):
        shown = [row for row in rows if row["source"] == source and _norms(row)]
        parts += [f"## All {source} models with BatchNorm", table(HEADER, map(_cells, shown))]
    return "\n\n".join(parts) + "\n"


def short(rows: Sequence[Row]) -> str:
    """Return what a terminal shows: the summary, and what is not as asked."""
    lines = [f"{a:70} {b:10} {c}" for a, b, c in _summary(rows)]
    return "\n".join([*lines, "", *_left(rows), "", *_failures(rows)])


def _norms(row: Row) -> int:
    return int(row.get("slim", {}).get("norms", [row.get("norms", 0)])[0])


def _done(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "ok" and "slim" in row]


def _summary(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    done = _done(rows)
    sample = catalogue.sample()
    family = [row for row in done if row["source"] == "timm" and row["name"] in sample]
    runs = [(row["name"], row[kind]) for row in done for kind in ("slim", "signs") if kind in row]
    errors = [run["error"] for _, run in runs]
    worst = max(errors, default=0.0)
    magnified = [(name, run) for name, run in runs if run["error"] > EXACT]
    beyond = sum(run["error"] > RELATIVE * run["own"] for _, run in magnified)
    named = "; ".join(f"{n} {run['error']:.1e} by {run['own']:.1e}" for n, run in magnified)
    return [
        ("models slimmed", "all that trace", f"{len(done)} of {len(_run(rows))}"),
        (
            f"float64 error at most {EXACT:g}",
            "everywhere",
            f"{sum(error <= EXACT for error in errors)} of {len(errors)}; worst {worst:.1e}",
        ),
        (
            f"… or at most {RELATIVE:g} times what rounding the inputs does to the original",
            "",
            f"{len(magnified) - beyond} of the other {len(magnified)}"
            + (f" ({named})" if named else ""),
        ),
        ("BatchNorms gone, the smallest model of every timm family", "95 %", _share(family)),
        ("the same with negative gains", "", _share(family, "signs")),
        ("the same, torch.fx's fuser (all kept where it fails)", "", _peer_share(family, "fx")),
        ("the same, timm's reparameterize_model", "", _peer_share(family, "timm")),
        ("BatchNorms gone, all models", "", _share(done)),
        ("never more nodes than before", "everywhere", _no_growth(done)),
        ("no more ONNX nodes than the best of the other tools", "", _against(done)),
    ]


def _run(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row.get("large")]


def _share(rows: Sequence[Row], kind: str = "slim") -> str:
    pairs = [row[kind]["norms"] for row in rows if kind in row]
    before, after = (sum(side) for side in zip(*pairs, strict=True)) if pairs else (0, 0)
    return f"{before - after} of {before} ({(before - after) / max(before, 1):.1%})"


def _peer_share(rows: Sequence[Row], tool: str) -> str:
    before = sum(row.get("norms", 0) for row in rows)
    left = sum(row.get(tool, {}).get("norms", row.get("norms", 0)) for row in rows)
    failed = sum("error" in row.get(tool, {}) for row in rows)
    share = (before - left) / max(before, 1)
    return f"{before - left} of {before} ({share:.1%}); fails on {failed} of {len(rows)} models"


def _no_growth(rows: Sequence[Row]) -> str:
    held = sum(row["slim"]["nodes"][1] <= row["slim"]["nodes"][0] for row in rows)
    return f"{held} of {len(rows)}"


def _against(rows: Sequence[Row]) -> str:
    pairs = [(row["onnx"]["nodes"], _best(row)) for row in rows if "nodes" in row.get("onnx", {})]
    judged = [(own, best) for own, best in pairs if best is not None]
    fewer = sum(own < best for own, best in judged)
    more = sum(own > best for own, best in judged)
    return f"{len(judged) - more} of {len(judged)} ({fewer} fewer)"


def _best(row: Row) -> int | None:
    counts = [row[tool]["nodes"] for tool in TOOLS_ONNX if "nodes" in row.get(tool, {})]
    return min(counts, default=None)


def _named(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    found = {row["name"]: row for row in rows}
    lines = []
    for name, asked in ASKED.items():
        if name not in found:
            continue
        row = found[name]
        counts = [_count(row, tool, "norms") for tool in (*TOOLS_ONNX, "onnx")]
        goal = "as few as possible" if asked is None else f"at most {asked}" if asked else "0"
        lines.append((name, *counts[:3], goal, counts[3]))
    return lines


def _count(row: Row, tool: str, what: str) -> str:
    entry = row.get(tool, {})
    return str(entry[what]) if what in entry else "fails" if "error" in entry else "-"


def _cells(row: Row) -> tuple[str, ...]:
    slim, signs = row.get("slim", {}), row.get("signs", {})
    errors = [kind["error"] for kind in (slim, signs) if "error" in kind]
    return (
        row["name"],
        str(_norms(row)),
        _count(row, "fx", "norms"),
        _count(row, "timm", "norms"),
        str(slim["norms"][1]) if slim else "fails",
        str(signs["norms"][1]) if signs else "-",
        f"{max(errors):.0e}" if errors else "-",
        *(_both(row, tool) for tool in (*TOOLS_ONNX, "onnx")),
    )


def _both(row: Row, tool: str) -> str:
    nodes = _count(row, tool, "nodes")
    return f"{nodes} / {_count(row, tool, 'norms')}" if nodes.isdigit() else nodes


def _left(rows: Sequence[Row]) -> list[str]:
    """Return a list item for every model that keeps a BatchNorm."""
    items = []
    for row in _done(rows):
        slim = row["slim"]
        if not slim["norms"][1]:
            continue
        reasons = "; ".join(f"{count} times {reason}" for reason, count in slim["reasons"].items())
        items.append(f"- {row['name']}: {slim['norms'][1]} of {slim['norms'][0]}. {reasons}")
    return ["\n".join(items)] if items else ["Nothing."]


def _failures(rows: Sequence[Row]) -> list[str]:
    """Return a list item for every model that was not slimmed, and for every tool that failed."""
    items = [
        f"- {row['name']}: {row.get('error', row['status'])}"
        for row in _run(rows)
        if row["status"] != "ok"
    ]
    for tool in ("fx", "timm", *TOOLS_ONNX, "onnx"):
        failed = [row["name"] for row in rows if "error" in row.get(tool, {})]
        if failed:
            label = "ours, export" if tool == "onnx" else tool
            items.append(f"- {label} fails on {len(failed)}: {', '.join(failed)}")
    return ["\n".join(items)] if items else ["Nothing."]
