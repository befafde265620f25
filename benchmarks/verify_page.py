"""docs/verify.md from what the other scripts measured and left as JSON beside it.

    python -m benchmarks.verify_page [--docs FOLDER]

Each section stands for one file, and says how the file is made where it is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import mutants_page
from benchmarks.markdown import table
from dropsurgery.verify.gate import Gate
from dropsurgery.verify.verdict import KINDS

DOCS = Path(__file__).parents[1] / "docs"
Document = dict[str, Any]
_LIMITS = {"rmse": "rmse", "max": "maximum", "typical": "typical", "mean": "mean"}


def calibration(document: Document) -> str:
    """Return how far exports that are right stay from the limits of the gate."""
    rows = document["rows"]
    alarms = sum(not row["ok"] for row in rows)
    networks = len({row["model"] for row in rows})
    body = []
    for kind in KINDS:
        found = sorted(row["ratios"][kind] for row in rows if kind in row["ratios"])
        share = max(row["ratios"][kind] / row["limits"][kind] for row in rows)
        limit = getattr(Gate(), _LIMITS[kind])
        middle = statistics.median(found)
        body.append((kind, f"{middle:.2f}", f"{found[-1]:.2f}", limit, f"{100 * share:.0f} %"))
    algebra = [row["algebra"] / row["own"] for row in rows if row["algebra"] is not None]
    return "\n".join(
        [
            f"{len(rows)} exports that are right ({networks} networks, fresh weights with random "
            "statistics, with and without `slim`): the candidate's error against float64, in "
            f"multiples of the network's own. {alarms} false alarms.",
            "",
            table(("ratio", "median", "worst", "limit k", "worst share of the limit used"), body),
            "",
            "The limit that a ratio is held to is k, widened where an output has few values. "
            "Rounding puts the ratios near one whatever the depth and the scale, so that k = 3 "
            "leaves a factor for kernels that add in another order; a changed epsilon, statistic "
            "or activation is orders of magnitude away (see the mutants).",
            "",
            "Surgery has a budget of its own, float64 against float64. Folding rounds its new "
            f"weights to float32 once; that costs {min(algebra):.2f} to {max(algebra):.2f} of the "
            "network's own error in float32 (limit: 5). Without new weights the limit is 1e-12."
            if algebra
            else "",
        ]
    )


def cost(document: Document) -> str:
    """Return what calls of `verify` and `locate` cost, in runs."""
    rows = [
        (
            row["model"],
            f"{row['size']} px",
            row["inputs"],
            *(f"{row['seconds'][key]:.2f} s" for key in ("plain", "float64", "verify")),
            f"{row['plain_runs']:.1f}",
            f"{row['ratio']:.2f} ({row['range'][0]:.2f} to {row['range'][1]:.2f})",
        )
        for row in document["models"]
    ]
    found = [
        (
            row["model"],
            *(f"{row['seconds'][key]:.2f} s" for key in ("verify", "locate")),
            f"{row['locating']:.2f} ({row['locating_range'][0]:.2f} to "
            f"{row['locating_range'][1]:.2f})",
        )
        for row in document["models"]
    ]
    versions = document["versions"]
    return "\n".join(
        [
            f"Allowed are {document['allowed_plain_runs']} plain onnxruntime runs and one float64 "
            "run for each input. Times are of the processor, of one thread, and sums over all "
            "inputs that `verify` runs by default, the set-up of its session among them; the last "
            "column is the share of the allowance.",
            "",
            table(
                ("model", "images", "inputs", "plain runs", "float64 runs", "verify",
                 "plain runs beside float64", "share"),
                rows,
            ),
            "",
            "`locate` on a file in which one weight half-way down has the wrong sign; allowed are "
            f"{document['allowed_locating']} times the time of `verify`:",
            "",
            table(("model", "verify", "locate", "locate / verify"), found),
            "",
            f"torch {versions['torch']}, Python {versions['python']}, {versions['threads']} "
            f"{'thread' if versions['threads'] == 1 else 'threads'}, medians of "
            f"{document['repeat']} rounds.",
        ]
    )  # fmt: skip


def zoo(document: Document) -> str:
    """Return the sweep for false alarms."""
    rows = document["rows"]
    counts = Counter(row["status"] for row in rows)
    equal = [row for row in rows if row["status"] == "equal"]
    lines = [
        f"{len(rows)} of {document['of']} models of the zoo, fresh weights with random "
        "statistics, slimmed and exported, 3 seeds, batches of 1 and 3, CPU: "
        + ", ".join(f"{count} {status}" for status, count in counts.most_common())
        + ".",
        "",
    ]
    if equal:
        worst = {kind: max(row["ratios"].get(kind, 0.0) for row in equal) for kind in KINDS}
        shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in worst.items())
        lines += [f"Largest share of a limit that an equal file used: {shares}.", ""]
    for title, statuses in (
        ("Not equal", ("differs",)),
        ("Not exported, not run or not done", ("not exported", "not run", "timeout", "crash")),
        ("Errors", ("error",)),
    ):
        found = [row for row in rows if row["status"] in statuses]
        if found:
            body = [
                (row["label"], row["status"], "; ".join(row.get("problems") or [row["why"]]))
                for row in found
            ]
            lines += [f"### {title}", "", table(("model", "", "why"), body), ""]
            lines += [text for row in found for text in (FOUND.get(row["label"]), "") if text]
    return "\n".join(lines).rstrip()


def mutants(document: Document) -> str:
    """Return the mutation score, as its own page writes it, without the heading."""
    return mutants_page.section(document).split("\n\n", 1)[1].strip()


# True defects behind verdicts that a file differs, and the script that shows each.
FOUND = {
    "timm:resnetv2_50x1_bit": (
        "resnetv2_50x1_bit is right as a file, and onnxruntime's optimiser makes it wrong: "
        "`Pad_Fusion` moves the zeros that its stem pads with into the max pooling behind, which "
        "pads with -inf. `ds.locate` says so; `python -m benchmarks.found.pad_max_pool` shows it "
        "with two layers.\n"
    )
}
SECTIONS: tuple[tuple[str, str, str, Callable[[Document], str]], ...] = (
    ("The limits", "verify_gate.json", "python benchmarks/verify_gate.py", calibration),
    ("Mutation score", "mutants.json", "python -m benchmarks.mutants", mutants),
    ("No false alarm", "verify_zoo.json", "python -m benchmarks.verify_zoo", zoo),
    ("Cost", "verify_cost.json", "python -m benchmarks.verify", cost),
)


def page(docs: Path) -> str:
    """Return the whole page."""
    parts = ["# How far `verify` can be trusted", "", "`python -m benchmarks.verify_page`"]
    for title, name, command, section in SECTIONS:
        path = docs / name
        body = f"Not measured yet: `{command}` writes docs/{name}."
        if path.is_file():
            body = f"`{command}`\n\n{section(json.loads(path.read_text()))}"
        parts += ["", f"## {title}", "", body]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    (options.docs / "verify.md").write_text(page(options.docs))


if __name__ == "__main__":
    main()
