"""docs/train_step.md from what benchmarks/train_step.py measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

NAMES = {
    "resnet110": "ResNet-110 (CIFAR), 32²",
    "resnet50": "ResNet-50, 128²",
    "vit_small": "ViT-S/16, 96²",
    "convnext_tiny": "ConvNeXt-T, 96²",
    "swin_tiny": "Swin-T, 112²",
}
CONVOLUTIONAL = ("resnet110", "resnet50")
PUBLISHED = """\
What others publish, on other machines and therefore not comparable in the last digit: Composer's
block-wise stochastic depth reports 5 % less wall-clock time for ResNet-50 at a drop rate of 0.2 and
10 % for ResNet-101 at 0.4; its sample-wise form costs 5 %. The paper reports about 25 % less for
p_L = 0.5. DINOv2's code says that its saving is about the drop rate, above 0.1. Its way of drawing
int(B·p) samples changes the rate (B = 4, drop 0.1: it drops 0.25), here the rate is exact."""


def write(results: Path) -> None:
    """Write the page beside the file of results."""
    document = json.loads(results.read_text())
    parts = [
        "# Training time with stochastic depth",
        "`python -m benchmarks.train_step`, then `--memory`, `--break-even` and `--page`. Each "
        "figure is the time of a whole training step (forward, backward, SGD) over that of the "
        "plain network in the same round: the median of the rounds. *ideal* is the share of the "
        "forward's operations that is run in expectation (`ds.expected_compute`); *over ideal* "
        'divides by it (for "batch", whose cost is random, by that of the branches that were '
        "really run, and takes the mean). The paper's linear rule. "
        f"{document['about']}.",
    ]
    if "note" in document:
        parts.append(f"**{document['note']}**")
    for final in ("0.5", "0.8"):
        parts += [f"## p_L = {final}", steps_table(document["steps"], final)]
    parts += ["## In sum", summary(document["steps"]), PUBLISHED]
    if "memory" in document:
        parts += ["## Peak memory", memory_table(document["memory"])]
    if "break-even" in document:
        parts += ["## Where a subset begins to pay", break_even_table(document["break-even"])]
    results.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ordered(steps: dict[str, Any]) -> list[str]:
    """Return the cases by network and batch size."""
    names = list(NAMES)
    return sorted(
        steps, key=lambda case: (names.index(case.split(":")[0]), int(case.split(":")[1]))
    )


def steps_table(steps: dict[str, Any], final: str) -> str:
    """Return the table of one rate."""
    references = final == "0.5"
    header = [
        *("network", "batch", "row", "subset", "ideal", "over ideal"),
        *("batch mode", "ideal", "over ideal"),
    ]
    if references:
        header += ["timm's drop path", "DINOv2's way"]
    rows = []
    for case in ordered(steps):
        found, (name, batch) = steps[case], case.split(":")
        if f"row {final}" not in found:
            continue
        row = [NAMES[name], batch, f"{found[f'row {final}']['ratio']:.3f}"]
        for mode in ("subset", "batch"):
            entry = found[f"{mode} {final}"]
            over = entry["against ideal"]
            row += [f"{entry['ratio']:.3f}", f"{entry['ideal']:.3f}", f"{over:.3f}"]
        if references:
            for key in ("timm's drop path 0.5", "DINOv2's subset 0.5"):
                row.append(f"{found[key]['ratio']:.3f}" if key in found else "has none")
        rows.append(tuple(row))
    return table(tuple(header), rows)


def summary(steps: dict[str, Any]) -> str:
    """Say how far the goals are met."""
    lines = []
    for title, names, limit in (
        ("ResNets", CONVOLUTIONAL, 1.06),
        ("ConvNeXt and the transformers", tuple(n for n in NAMES if n not in CONVOLUTIONAL), 1.02),
    ):
        over = {
            case: steps[case]["subset 0.5"]["against ideal"]
            for case in ordered(steps)
            if case.split(":")[0] in names and int(case.split(":")[1]) >= 64
        }
        met = sum(value <= limit for value in over.values())
        each = ", ".join(f"{case} {value:.3f}" for case, value in over.items())
        lines.append(
            f"- subset over ideal at p_L = 0.5, batch 64 and more, {title}: {met} of {len(over)} "
            f"within {limit} ({each})."
        )
    over_batch = [
        entry["against ideal"]
        for found in steps.values()
        for key, entry in found.items()
        if key.startswith("batch ")
    ]
    lines.append(
        f"- batch mode over ideal, mean over all cases: {statistics.fmean(over_batch):.3f} "
        f"(asked: at most 1.04; from {min(over_batch):.3f} to {max(over_batch):.3f})."
    )
    slower = [
        f"{case} at p_L = {final} ({steps[case][f'subset {final}']['ratio']:.3f})"
        for case in ordered(steps)
        for final in ("0.5", "0.8")
        if f"subset {final}" in steps[case] and steps[case][f"subset {final}"]["ratio"] > 1.0
    ]
    lines.append(f"- subset slower than the plain network: {', '.join(slower) or 'nowhere'}.")
    return "\n".join(lines)


def memory_table(memory: dict[str, Any]) -> str:
    """Return the table of peaks."""
    header = ("network, batch 64, p_L = 0.5", "plain, MB", "row", "subset", "ideal subset", "batch")
    rows = [
        (
            NAMES[name],
            f"{found['plain, MB']:.0f}",
            *(f"{found[key]:.3f}" for key in ("row", "subset", "ideal subset", "batch")),
        )
        for name, found in memory.items()
    ]
    about = (
        "Growth of the process's peak resident set during one step, over that of the plain "
        "network, each in a process of its own. The ideal counts what autograd keeps: every "
        "branch's share for the chosen rows only. In batch mode one draw decides."
    )
    return f"{about}\n\n{table(header, rows)}"


def break_even_table(found: dict[str, Any]) -> str:
    """Return the table of small constant rates, stage by stage."""
    rows = []
    for name, entries in found.items():
        stages: dict[str, list[str]] = {}
        for key, entry in entries.items():
            stage = key.rpartition(" ")[0]
            stages.setdefault(stage, []).append(f"{entry['ratio']:.3f} ({entry['ideal']:.3f})")
        rows += [(NAMES[name], stage, *cells) for stage, cells in stages.items()]
    rates = [key.rpartition(" ")[2] for key in next(iter(found.values()))]
    header = ("network, batch 64", "sites in", *(f"drop {rate}" for rate in dict.fromkeys(rates)))
    about = (
        "The whole step over the plain network's, with one constant rate on the sites of one stage "
        'and nowhere else, "subset" forced at every rate; in brackets the ideal. '
        "`ds.layers.drop_path.BREAK_EVEN` is the rate from which on no stage is slower."
    )
    return f"{about}\n\n{table(header, rows)}"
