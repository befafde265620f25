"""docs/train_step.md from what benchmarks/train_step.py and train_compiled.py measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.train_rounds import AS_IT_IS, COMPILED
from dropsurgery.layers.drop_path import BREAK_EVEN, BREAK_EVEN_BELOW, ONEDNN_FROM

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


ABOUT = """\
`python -m benchmarks.train_step`, then `--memory`, `--break-even`,
`--by-batch` and `--page`. Each figure is the
time of a whole training step (forward, backward, SGD) over that of the plain network's steps right
before and after it: the median of {rounds} rounds. *ideal* is the share of the forward's operations
that is run in expectation (`ds.expected_compute`); *over ideal* divides by it (for "batch", whose
cost is random, each step by that of the branches that it really ran). *Ideal by time*
weighs the branches of each stage by the time that they were measured to take, in the same rounds,
in place of their operations: [below](#operations-and-time). The paper's linear rule; subset with
its default break-even. {about}; glibc is told to keep freed memory (`MALLOC_TRIM_THRESHOLD_`) and
to take huge pages, or page faults come and go by what ran before."""
CAUSES = """\
What the first ideal counts, products, is not what takes the time. Normalisation, activations and
copies between memory formats count nothing. In a network whose early stages have large images and
few channels they make an early stage take more than its share of the operations, and the linear
rule drops least there; what is outside of the branches (stem, skips, sums and what follows them,
head, optimiser) is never saved. The time of a stage's branches is the plain step less one of the
same network that never runs them."""
ABOUT_COMPILED = """\
`python -m benchmarks.train_compiled`: the same with every network compiled by
`torch.compile(fullgraph=True)`, the plain one as well, {rounds} rounds in one to four processes.
Compiled code runs what stands between the products in few passes, so that time goes by operations
more closely. Its sizes are fixed: it computes ceil(B·p) samples of each branch, B·p being the
ideal's; *computed* is the share of operations with these. "batch" is not here: the graph breaks
where it draws. *not compiled* is the plain network's step without compiling."""
ABOUT_AS_IT_IS = """\
`--malloc-as-it-is`, {rounds} rounds: the C library gives freed memory back, as it does without
being told otherwise, and each page that a step takes anew costs a fault. The plain network takes
more of them, which favours the subset beyond what it saves in operations."""
NO_GPU = """\
Not measured: a GPU was not at hand, so neither the table in fp32 and bf16, eager and compiled, nor
the profiler's word on host synchronisation is here. By design the subset's numbers are drawn on the
host in eager code, so that nothing waits for the device."""


def write(results: Path) -> None:
    """Write the page beside the file of results."""
    document = json.loads(results.read_text())
    steps = document["steps"]
    parts = [
        "# Training time with stochastic depth",
        " ".join(ABOUT.format(rounds=counted_rounds(steps), about=document["about"]).split("\n")),
    ]
    if "note" in document:
        parts.append(f"**{document['note']}**")
    parts += ["## In sum", summary(document)]
    for final in ("0.5", "0.8"):
        parts += [f"## p_L = {final}", steps_table(steps, final)]
    if COMPILED in document:
        parts += ["## Compiled", compiled_table(document[COMPILED], ABOUT_COMPILED)]
    if AS_IT_IS in document:
        parts.append(compiled_table(document[AS_IT_IS], ABOUT_AS_IT_IS))
    parts += ["## Operations and time", CAUSES.replace("\n", " "), stages_table(steps)]
    if "by batch" in document:
        parts += ["## What a sample costs in smaller batches", by_batch_table(document["by batch"])]
    if "break-even" in document:
        parts += ["## Where a subset begins to pay", break_even_table(document["break-even"])]
    if "memory" in document:
        parts += ["## Peak memory", memory_table(document["memory"])]
    parts += ["## What others publish", PUBLISHED]
    results.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def ordered(steps: dict[str, Any]) -> list[str]:
    """Return the cases by network and batch size."""
    names = list(NAMES)
    return sorted(
        steps, key=lambda case: (names.index(case.split(":")[0]), int(case.split(":")[1]))
    )


def steps_table(steps: dict[str, Any], final: str) -> str:
    """Return the table of one rate."""
    references = final == "0.5"
    of_mode = ("ideal", "over ideal", "ideal by time", "over it")
    header = ["network", "batch", "row", "subset", *of_mode, "batch mode", *of_mode]
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
            row.append(f"{entry['ratio']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})")
            keys = ("ideal", "against ideal", "ideal by time", "against ideal by time")
            row += [f"{entry[key]:.3f}" for key in keys]
        if references:
            for key in ("timm's drop path 0.5", "DINOv2's subset 0.5"):
                row.append(f"{found[key]['ratio']:.3f}" if key in found else "has none")
        rows.append(tuple(row))
    return table(tuple(header), rows)


def compiled_table(found: dict[str, Any], about: str) -> str:
    """Return a table of compiled steps behind what it is of."""
    ideals = ("ideal", "over ideal", "computed", "over computed")
    header = ("network", "batch", "p_L", "row", "subset", *ideals, "not compiled")
    keys = ("ideal", "against ideal", "computed", "against computed")
    rows = []
    for case in ordered(found):
        entries, (name, batch) = found[case], case.split(":")
        for final in ("0.5", "0.8"):
            if f"subset {final}" not in entries:
                continue
            entry, row = entries[f"subset {final}"], entries.get(f"row {final}")
            rows.append(
                (
                    NAMES[name],
                    batch,
                    final,
                    f"{row['ratio']:.3f}" if row else "",
                    f"{entry['ratio']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})",
                    *(f"{entry[key]:.3f}" for key in keys),
                    f"{entries['not compiled']['ratio']:.2f}" if final == "0.5" else "",
                )
            )
    about = " ".join(about.format(rounds=counted_rounds(found)).split("\n"))
    return f"{about}\n\n{table(header, rows)}"


def counted_rounds(steps: dict[str, Any]) -> str:
    """Return how many rounds there were, or from how many to how many."""
    counts = sorted({found["rounds"] for found in steps.values()})
    return " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))


def stages_table(steps: dict[str, Any]) -> str:
    """Return the shares that the branches of each stage take of operations and of time."""
    rows = []
    for case in ordered(steps):
        stages, (name, batch) = steps[case]["stages"], case.split(":")
        if batch != "64":
            continue
        cells = [
            f"{stage.rstrip('*')}: {share['operations']:.1%}, {share['time']:.1%}"
            for stage, share in stages.items()
        ]
        outside = [1.0 - sum(s[key] for s in stages.values()) for key in ("operations", "time")]
        cells.append(f"outside: {outside[0]:.1%}, {outside[1]:.1%}")
        rows.append((NAMES[name], "; ".join(cells)))
    return table(("network, batch 64", "share of operations, of time"), rows)


# Networks and how much of the ideal a subset is to take at most; ConvNeXt is held to what the
# transformers are.
LIMITS = (
    ("ResNets", CONVOLUTIONAL, 1.06),
    ("ViT and Swin", ("vit_small", "swin_tiny"), 1.02),
    ("ConvNeXt", ("convnext_tiny",), 1.02),
)


def summary(document: dict[str, Any]) -> str:
    """Say how far the goals are met."""
    steps = document["steps"]
    lines = []
    for title, names, limit in LIMITS:
        lines += within(document.get(COMPILED, {}), names, f"Compiled, {title}", limit)
        found = document.get(AS_IT_IS, {})
        lines += within(found, names, f"Compiled, malloc as it is, {title}", limit)
        lines += within(steps, names, f"Eager, {title}", limit)
        lines += within(steps, names, f"Eager, {title}", limit, " by time")
    large = [case for case in steps if int(case.split(":")[1]) >= 64]
    for title, names, _ in LIMITS:
        floor = [
            steps[case]["batch 0.5"]["against ideal"]
            for case in large
            if case.split(":")[0] in names
        ]
        if floor:
            lines.append(
                f"- {title}: eager batch mode, which runs nothing of what it drops, takes "
                f"{min(floor):.3f} to {max(floor):.3f} of its ideal at p_L = 0.5, batch 64 and "
                "more: less no eager subset can be asked for."
            )
    batches = [
        entry
        for found in steps.values()
        for key, entry in found.items()
        if key.startswith("batch ")
    ]
    for key, ideal in (("against ideal", "ideal"), ("against ideal by time", "ideal by time")):
        over = [entry[key] for entry in batches]
        lines.append(
            f"- batch mode over {ideal}, mean over all cases: {statistics.fmean(over):.3f} "
            f"(asked: at most 1.04 of the ideal; from {min(over):.3f} to {max(over):.3f})."
        )
    for title, found in (("Eager", steps), ("Compiled", document.get(COMPILED, {}))):
        lines.append(f"- {title}, subset slower than the plain network: {slower(found)}.")
    lines += ["- " + " ".join(NO_GPU.split("\n"))]
    return "\n".join(lines)


def within(
    found: dict[str, Any], names: tuple[str, ...], title: str, limit: float, by: str = ""
) -> list[str]:
    """Say how many cases of a group of networks are within their limit, if there are any."""
    over = {
        case: found[case]["subset 0.5"][f"against ideal{by}"]
        for case in ordered(found)
        if case.split(":")[0] in names and int(case.split(":")[1]) >= 64
    }
    if not over:
        return []
    met = sum(value <= limit for value in over.values())
    each = ", ".join(f"{case} {value:.3f}" for case, value in over.items())
    return [
        f"- {title}, subset over ideal{by} at p_L = 0.5, batch 64 and more: {met} of {len(over)} "
        f"within {limit} ({each})."
    ]


def slower(steps: dict[str, Any]) -> str:
    """Name the cases in which a subset takes longer than the plain network."""
    cases = []
    for case in ordered(steps):
        for final in ("0.5", "0.8"):
            entry = steps[case].get(f"subset {final}", {"ratio": 0.0})
            if entry["ratio"] > 1.0:
                masked = ", every branch masked" if entry["ideal"] == 1.0 else ""
                cases.append(f"{case} at p_L = {final} ({entry['ratio']:.3f}{masked})")
    return ", ".join(cases) or "nowhere"


def memory_table(memory: dict[str, Any]) -> str:
    """Return the table of peaks, and of what autograd keeps where that was counted."""
    peaks = ("row", "subset", "batch")
    counted = ("plain kept, MB", "row kept", "subset kept", "ideal subset")
    header = ("network", "batch", "plain peak, MB", *peaks, *counted)
    rows = []
    for key, found in memory.items():
        name, _, batch = key.partition(":")
        cells = [f"{found[mode]:.3f}" for mode in peaks]
        for column in counted:
            digits = 0 if column.endswith("MB") else 3
            cells.append(f"{found[column]:.{digits}f}" if column in found else "")
        rows.append((NAMES[name], batch or "64", f"{found['plain, MB']:.0f}", *cells))
    about = (
        "p_L = 0.5. First the growth of the process's peak resident set during one step, over that "
        "of the plain network, each in a process of its own: what the C library does with freed "
        "memory is in it. In batch mode one draw decides. Then the bytes that autograd keeps from "
        "the forward for the backward, counted tensor by tensor (`saved_tensors_hooks`), the mean "
        "of three draws. The ideal is of these: every branch's share for the chosen rows only."
    )
    return f"{about}\n\n{table(header, rows)}"


def by_batch_table(found: dict[str, Any]) -> str:
    """Return what a sample costs the plain network at each batch size."""
    sizes = list(next(iter(found.values())))
    rows = [
        (NAMES[name], *(f"{entries[size]:.3f}" for size in sizes))
        for name, entries in found.items()
    ]
    about = (
        "The plain network's step, time a sample: 32 to 56 samples over 64, 8 to 14 over 16. Where "
        "this is above 1, a branch that is run for fewer samples saves less than its operations: "
        "with 16 samples in ResNet-50 a subset of 8 to 14 gains little, whoever draws it."
    )
    return f"{about}\n\n{table(('network', *sizes), rows)}"


def break_even_table(found: dict[str, Any]) -> str:
    """Return the table of small constant rates, stage by stage."""
    rates = sorted({key.rpartition(" ")[2] for entries in found.values() for key in entries})
    rows = []
    for case in ordered(found):
        name, batch = case.split(":")
        for stage in dict.fromkeys(key.rpartition(" ")[0] for key in found[case]):
            cells = [
                f"{entry['ratio']:.3f} ({entry['ideal']:.3f})" if entry else ""
                for entry in (found[case].get(f"{stage} {rate}") for rate in rates)
            ]
            rows.append((NAMES[name], batch, stage.rstrip("*"), *cells))
    header = ("network", "batch", "sites in", *(f"drop {rate}" for rate in rates))
    about = (
        "The whole step over the plain network's, with one constant rate on the sites of the first "
        'or the last stage and nowhere else, "subset" forced at every rate; in brackets the ideal '
        f"(1 where no sample is left out). From a rate of {BREAK_EVEN} on a subset is computed "
        f"without being forced, and from {BREAK_EVEN_BELOW} on where it takes a branch with "
        f"convolutions of one pixel below {ONEDNN_FROM} samples on one thread, as in ResNet-50 at "
        "16; below that the row mask drops."
    )
    return f"{about}\n\n{table(header, rows)}"
