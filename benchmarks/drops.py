"""The drop family, checked in five networks and timed against public implementations.

Writes docs/drops.md: a table method by check for each network, in which every cell is a check that
was run, and the training step of each layer as a ratio to the fastest public implementation of the
same thing, medians of interleaved runs in one process.

    python -m benchmarks.drops [--repeat 31] [--markdown docs/drops.md] [--only NETWORK]
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from pathlib import Path

import torch

from benchmarks import drop_compile
from benchmarks.drop_checks import COLUMNS, METHODS, Bench, attentive_cells, networks
from benchmarks.drop_speed import measure, races

CHECKS = """\
- **insert**: how many layers the pass put in, with the state-dict keys as they were; or why none.
- **eval identity**: the eval output is the plain network's, bit for bit.
- **statistics**: the first inserted layer on the shape (and, where they matter, the values) that it
  meets in this network, 300 draws: mean and variance of the factor (dropout, noise, DropConnect),
  share of dropped units and mean (DropBlock, DropPath), kept channels and the sum of their scores
  (Weighted Channel Dropout, exact), mean area (Cutout); in brackets the largest distance from
  theory in standard errors, of which 4 are allowed.
- **compile**: `torch.compile(fullgraph=True)` captures a training step of the whole network as one
  graph, without a break (inductor's code for each layer has its own table).
- **export**: `torch.export` of the eval form has the plain network's operations, in their order;
  below each table, the same for ONNX with all methods in the network at once.
- **retune**: with rates set to 0 a training step is the plain network's bit for bit, and with the
  rates set back it is not.
- **revert**: the removal gives the plain network's code, modules and outputs.
"""


COMPILED = """\
A training step of each layer under `torch.compile(fullgraph=True)`, at four rates in turn: one
graph for the first rate, one for every other.
"""


def row(cells: list[str]) -> str:
    """Return a line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def tables(only: str | None) -> list[str]:
    """Check every method in every network."""
    lines = []
    for name, model, x, tap in networks():
        if only not in (None, name):
            continue
        start = time.process_time()
        bench = Bench(model, x)
        lines += ["", f"### {name}", "", row(["method", *COLUMNS]), row(["---"] * 8)]
        for method in METHODS:
            lines.append(row([method.name, *bench.cells(method)]))
            print(lines[-1], flush=True)
        lines.append(row(["Attentive CutMix", *attentive_cells(model, x, tap)]))
        lines += ["", f"{bench.together(METHODS)}."]
        print(lines[-1], f"{time.process_time() - start:.0f} s", flush=True)
    return lines


def compiler() -> list[str]:
    """Compile every layer with inductor."""
    columns = drop_compile.COLUMNS
    lines = [row(list(columns)), row(["---"] * len(columns))]
    lines += [row(list(cells)) for cells in drop_compile.rows()]
    print("\n".join(lines), flush=True)
    return lines


def speed(repeat: int) -> list[str]:
    """Time every layer against its peers."""
    header = ["layer", "input", "ms", "fastest public", "ms", "ratio", "quartiles", ""]
    lines = [row(header), row(["---"] * len(header))]
    for race in races():
        ours, name, theirs, ratio, (low, high) = measure(race, repeat)
        lines.append(
            row([race.ours, " x ".join(map(str, race.shape)), f"{ours:.2f}", name,
                 f"{theirs:.2f}", f"**{ratio:.2f}**", f"{low:.2f} to {high:.2f}", race.note])
        )  # fmt: skip
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Check, measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=31, help="timed rounds of each comparison")
    parser.add_argument("--markdown", type=Path, help="write the page to this file")
    parser.add_argument("--only", help="one network")
    parser.add_argument(
        "--no-tables", action="store_true", help="only the speed; keeps the rest of the page"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    checked = [] if options.no_tables else tables(options.only)
    compiled = [] if options.no_tables else compiler()
    timed = speed(options.repeat)
    start = ["# The drop family", "", "`python -m benchmarks.drops --markdown docs/drops.md`", ""]
    start += ["## In five networks", "", CHECKS, *checked, "", "## Under inductor", "", COMPILED]
    head = "\n".join([*start, *compiled, "", ""])
    if options.no_tables and options.markdown and options.markdown.exists():
        head = options.markdown.read_text(encoding="utf-8").partition("## Speed")[0]
    about = (
        f"torch {torch.__version__}, Python {platform.python_version()}, one thread, processor "
        f"time of forward and backward, medians of {options.repeat} interleaved rounds. Where 1 "
        "lies within the quartiles, both make the same passes over the map."
    )
    page = "\n".join(["## Speed", "", *timed, "", about])
    if options.markdown:
        options.markdown.write_text(f"{head}{page}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
