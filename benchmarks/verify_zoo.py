"""Does `ds.verify` raise false alarms? Every model of the zoo: slim, export, verify.

Each model is built with fresh weights and random statistics, for the smallest images that it
accepts, in a process of its own with a time limit. Results are kept in a cache folder, so that a
sweep that was stopped goes on where it was; the whole writes docs/verify_zoo.json.

    python -m benchmarks.verify_zoo [--only PATTERN] [--limit N] [--timeout S] [--fresh]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

import dropsurgery as ds
from benchmarks.verify_gate import randomize
from benchmarks.zoo import catalogue, sweep
from benchmarks.zoo.catalogue import Entry
from dropsurgery.errors import DropsurgeryError, ExportError

ROOT = Path(__file__).parents[1]
PATTERNS = ("verify/*.py", "export.py", "onnx_*.py", "passes/*.py", "graph/*.py")
SOURCES = sorted(p for pattern in PATTERNS for p in (ROOT / "dropsurgery").glob(pattern))
Row = dict[str, Any]


def fingerprint() -> str:
    """Return a digest of everything that a row depends on."""
    return sweep.digest_of(sweep.versions(), (*SOURCES, Path(__file__)))


def smallest(entry: Entry) -> tuple[nn.Module, Tensor] | str:
    """Return a model and an example of the smallest input it accepts, or why there is none."""
    problem = "no input is small enough"
    plain = catalogue.build(entry, native=False)
    if plain is None:
        return "the model takes no drop path argument"
    if sum(p.numel() for p in plain.parameters()) > catalogue.META_ONLY:
        return f"more than {catalogue.META_ONLY:.0e} parameters"
    for shape, side in catalogue.input_shapes(entry, plain):
        try:
            model = plain if side is None else catalogue.build(entry, native=False, size=side)
            if model is None:
                continue
            example = torch.randn(2, *shape)
            with torch.no_grad():
                model.eval()(example)
        except Exception as error:  # another size may do
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            continue
        return randomize(model, 0).eval(), example
    return problem


def check(entry: Entry) -> Row:
    """Return what `verify` says of one model."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    row: Row = {"label": entry.label, "family": entry.family}
    found = smallest(entry)
    if isinstance(found, str):
        return {**row, "status": "not run", "why": found}
    model, example = found
    row["input"] = list(example.shape[1:])
    surgered: nn.Module | None
    try:
        surgered = ds.slim(model)
    except DropsurgeryError as error:
        surgered, row["not slimmed"] = None, error.problem
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        start = time.perf_counter()
        try:
            ds.export_onnx(surgered or model, path, example)
        except ExportError as error:
            return {**row, "status": "not exported", "why": error.problem}
        row["export seconds"] = round(time.perf_counter() - start, 1)
        start = time.perf_counter()
        verdict = ds.verify(model, path, surgered=surgered)
        row["verify seconds"] = round(time.perf_counter() - start, 1)
    return {
        **row,
        "status": "equal" if verdict.ok else "differs",
        "tested": verdict.tested,
        "problems": [*verdict.problems, *(o.reason for o in verdict.outputs if o.reason)],
        "notes": list(verdict.notes),
        "inputs": len(verdict.inputs),
        "own error": max((o.reference_error or 0.0 for o in verdict.outputs), default=0.0),
        "ratios": _worst(verdict.outputs),
        "algebra": max((o.algebra.error / o.algebra.limit for o in verdict.outputs if o.algebra),
                       default=None),
    }  # fmt: skip


def _worst(outputs: tuple[Any, ...]) -> dict[str, float]:
    """Return the largest share of each limit that a ratio takes."""
    worst: dict[str, float] = {}
    for output in outputs:
        for ratio in output.ratios:
            share = round(ratio.value / ratio.limit, 3)
            worst[ratio.kind] = max(worst.get(ratio.kind, 0.0), share)
    return worst


def guarded(entry: Entry) -> Row:
    """Check one model; a defect of ours is a row, too."""
    try:
        return check(entry)
    except Exception as error:
        return {"status": "error", "error": f"{type(error).__name__}: {error}"}


def judged(context: ForkServerContext, entry: Entry, timeout: float) -> Row:
    """Return the row of one model, which says why there is no verdict where there is none."""
    row = sweep.isolated(context, entry, guarded, timeout)
    if "error" in row:
        row["why"] = row.pop("error")
    return {"label": entry.label, "family": entry.family, **row}


def main() -> None:
    """Run the sweep, or what is left of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify_zoo", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", help="a name, label or family; * and ? work")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N new models")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="for one model")
    parser.add_argument("--fresh", action="store_true", help="use no results of an earlier run")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "verify_zoo")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "verify_zoo.json")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    mark = fingerprint()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.verify_zoo", "benchmarks.zoo.preload"])
    rows, new = [], 0
    models = sweep.matching(catalogue.entries(), options.only)
    for entry in models:
        path = options.cache / f"{entry.source}-{entry.name}.json"
        row = json.loads(path.read_text()) if path.is_file() and not options.fresh else {}
        if row.get("fingerprint") != mark:
            if options.limit is not None and new >= options.limit:
                continue
            row = {**judged(context, entry, options.timeout), "fingerprint": mark}
            path.write_text(json.dumps(row))
            new += 1
            told = row.get("problems") or row.get("why") or row.get("ratios")
            print(f"{entry.label:44} {row['status']:13} {told}", flush=True)
        rows.append({key: value for key, value in row.items() if key != "fingerprint"})
    document = {"versions": sweep.versions(), "of": len(models), "rows": rows}
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    print(f"{len(rows)} of {len(models)} models:", counts)


if __name__ == "__main__":
    main()
