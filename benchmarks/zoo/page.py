"""Rows as docs/zoo.md: what was asked for and measured, then every model."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.markdown import table
from benchmarks.zoo import catalogue, reasons
from benchmarks.zoo.catalogue import META_ONLY, RATE

Row = dict[str, Any]

# The models that the project names one by one.
SHOWN = (
    *(f"torchvision:{name}" for name in (
        "resnet18", "resnet50", "resnet152", "wide_resnet50_2", "resnext50_32x4d", "densenet121",
        "shufflenet_v2_x1_0", "mobilenet_v2", "mobilenet_v3_small", "mnasnet1_0",
        "regnet_y_400mf", "efficientnet_b0", "convnext_tiny", "swin_t", "swin_v2_t", "vit_b_16",
        "maxvit_t",
    )),
    *(f"timm:{name}" for name in (
        "resnet50", "hrnet_w18_small", "res2net50d", "mixer_b16_224", "efficientnet_b0",
        "convnext_tiny", "regnety_004", "dla34", "nf_regnet_b0",
    )),
)  # fmt: skip
EXACT_IN_TORCHVISION = ("efficientnet", "convnext", "swin", "mvit", "maxvit")
PROMISES = {
    "eval_identical": "eval output bit-identical after retrofit (random BatchNorm statistics)",
    "keys": "state-dict keys unchanged",
    "strict": "strict loading both ways",
    "gradients_finite": "a training step with every site dropping at 0.5, all gradients finite",
    "removed": "insert → remove restores code and modules",
}
INTRODUCTION = f"""\
Does dropsurgery find the residual branches that the authors of a network found worth dropping? Here
it is asked of every model family of timm (the two smallest models each, timm's own miniatures
`test_*` aside, and a few that the percentages leave out) and of every classification, segmentation,
video and detection-backbone model of torchvision. The page is written by `make zoo`
(`python -m benchmarks.zoo`); `zoo.json` beside it holds the same for machines.

**The oracle.** Many of these networks can be built with stochastic depth by their own authors. Each
such network is built with it (timm: `drop_path_rate={RATE}`; torchvision: the rate that its builder
sets) and without any. `find_residuals` sees only the one without. An add is known in both by the
call of the module whose forward holds it and its turn within that call.

- A **native site** is an add whose branch ends in a drop-path call at a nonzero rate. A layer in
  a module that the trace keeps whole counts as one that was missed. Calls that belong to no add
  (a whole path is dropped, or nobody reads the result) are no sites; they are told beside.
- **found**: no native site is missed. **exact**: found, and no other site, but where the native
  rates start at 0: sites behind a drop-path attribute at rate 0 that run before the last native
  drop; in networks that leave the attribute out at rate 0, the first block.
- **option**: what makes it exact where the default does not: one `include=`; one `where=` (the
  rule then counts the chosen sites, `count="chosen"`); or `example_inputs=`, which open blocks
  whose forward branches on sizes.
- **rule**: rule and `unit` that give all native rates within 1e-6.
- **train**: native weights copied over, both networks in training mode under one seed: "=" where
  the outputs are bit-identical with that rule ("linspace, single" is
  `ds.survival.linspace(…, single=True)`: rates in float32, as in most of timm); "= by table" where
  they are with the native rates written down one by one; else the largest difference over the
  largest value.

Sites and rates are read from graphs, at the model's own input size. Networks are run at the
smallest input that they take, 4 samples (2 from 200 pixels), float32, CPU; those of
{META_ONLY // 10**6} M parameters and more are not run.
"""


def write(rows: Sequence[Row], versions: dict[str, str], shown: Sequence[str] = SHOWN) -> str:
    """Return the page."""
    today = datetime.date.today().isoformat()
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    by_label = {_label(row): row for row in rows}
    parts = [
        "# The model zoo",
        f"Written {today} with {made}.{_kept_runs(rows)}",
        INTRODUCTION,
        "## Summary",
        table(("", "asked", "measured"), _summary(rows)),
        "### What a retrofit promises",
        table(("", "models"), _promises(rows)),
        "## Models that are not exact",
        _list(_not_exact(rows)),
        "## Exact, and the training output is not bit-identical by a rule",
        _list(_not_identical(rows)),
        "## Not traced, or failed",
        _list(_failures(rows)),
        "## Drop-path layers that drop no branch",
        _list(_no_branch(rows)),
        "## The 26 models of the issue",
        table(HEADER, [_cells(by_label[name]) for name in shown if name in by_label]),
    ]
    for source in ("timm", "torchvision"):
        parts += [f"## All {source} models", table(HEADER, _all(rows, source))]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _kept_runs(rows: Sequence[Row]) -> str:
    """Say how many models were not run again."""
    kept, ran = sum(bool(row.get("kept")) for row in rows), sum("run" in row for row in rows)
    if not kept:
        return ""
    return (
        f" Structure was read anew from all models. {ran - kept} networks were run anew; the other "
        f"{kept}, whose sites, rates and options are what they were, keep what an earlier sweep "
        "measured when it ran them."
    )


# --- summary -------------------------------------------------------------------------------------


def judged(rows: Iterable[Row], source: str | None = None) -> list[Row]:
    """Return the models that are traced and have native drop path on residual branches."""
    return [
        row
        for row in rows
        if source in (None, row["source"]) and row.get("oracle", {}).get("residual")
    ]


def _summary(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    sample = catalogue.sample()
    timm = [row for row in judged(rows, "timm") if row["name"] in sample]
    all_judged = judged(rows)
    exact = [row for row in all_judged if row["oracle"]["best"]["exact"]]
    run = [row for row in exact if "train" in row.get("run", {})]
    named = [
        row
        for row in judged(rows, "torchvision")
        if any(name in row["name"] for name in EXACT_IN_TORCHVISION)
    ]
    families = len({row["family"] for row in rows if row["source"] == "timm"})
    traced = [row for row in rows if row.get("traced")]
    examples = sum(bool(row.get("needs_examples")) for row in traced)
    return [
        (f"models (timm: {families} families)", "", str(len(rows))),
        (f"traced ({examples} of them only with `example_inputs`)", "",
         _share(len(traced), len(rows))),
        ("timm, two a family: every native site found, by default or with one option", "≥ 95 %",
         _share(_count(timm, "best", "found"), len(timm))),
        ("… exact, by default or with one option", "≥ 90 %",
         _share(_count(timm, "best", "exact"), len(timm))),
        ("… exact by default", "≥ 80 %",
         _share(_count(timm, "default", "exact"), len(timm))),
        ("torchvision EfficientNet, ConvNeXt, Swin, MViT, MaxViT, exact", "all",
         _share(_count(named, "best", "exact"), len(named))),
        ("… exact by default", "", _share(_count(named, "default", "exact"), len(named))),
        ("exact ones: a rule and unit give all native rates", "",
         _share(sum(bool(row["oracle"].get("rules")) for row in exact), len(exact))),
        ("exact ones that were run: training output bit-identical by a rule", "≥ 80 %",
         _share(sum(_same_by_rule(row) for row in run), len(run))),
        ("… by a rule or by the table of native rates", "",
         _share(sum(row["run"]["train"]["identical"] for row in run), len(run))),
        *_batch(rows),
    ]  # fmt: skip


def _batch(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return how claims about the batch axis compare with what two batch sizes show."""
    total: Counter[str] = Counter()
    told = [row["run"]["batch"] for row in rows if row.get("run", {}).get("batch")]
    for counts in told:
        total.update(counts)
    held = total["agree"] + total["contradict"]
    if not held:
        return []
    return [
        (f"operands of sites, {len(told)} networks: batch axis proved, and checked at two batch "
         "sizes", "no contradiction", f"{total['agree']} of {held} agree"),
        ("… batch axis not proved without example inputs", "",
         _share(total["open"], total["open"] + held + total["unchecked"])),
    ]  # fmt: skip


def _count(rows: Iterable[Row], which: str, what: str) -> int:
    return sum(bool(row["oracle"][which][what]) for row in rows)


def _same_by_rule(row: Row) -> bool:
    train = row["run"]["train"]
    return bool(train["identical"]) and train["by"]["rule"] != "table"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.1f} %)" if whole else "none"


def _promises(rows: Iterable[Row]) -> list[tuple[str, str]]:
    run = [row["run"] for row in rows if "run" in row]
    return [
        (text, _share(sum(bool(result.get(key)) for result in run), len(run)))
        for key, text in PROMISES.items()
    ]


# --- lists ---------------------------------------------------------------------------------------


def _not_exact(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in judged(rows):
        best = row["oracle"]["best"]
        if best["exact"]:
            continue
        what = [f"misses {len(best['missed'])}" + _some(best["missed"])] if best["missed"] else []
        what += [f"{len(best['extra'])} more" + _some(best["extra"])] if best["extra"] else []
        why = reasons.sites(_label(row)) or "no reason is written down"
        option = _option(row["oracle"]["option"])
        given = f" with {option}" if option else ""
        lines.append(f"`{_label(row)}`{given}: {', '.join(what)}. {why}")
    return lines


def _not_identical(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in judged(rows):
        train = row.get("run", {}).get("train")
        if train is None or _same_by_rule(row):
            continue
        why = reasons.rates(_label(row)) or "no reason is written down"
        lines.append(f"`{_label(row)}`: {_rule(row)}; {_train(row)}. {why}")
    return lines


def _failures(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in rows:
        run = row.get("run", {})
        broken = [key for key in PROMISES if not run.get(key, True)]
        if row["status"] != "ok":
            lines.append(f"`{_label(row)}`: {row['status']}: {row.get('error', '')}")
        elif not row["traced"]:
            lines.append(f"`{_label(row)}`: not traced: {row['trace_error']}")
        elif broken:
            why = reasons.promises(_label(row)) or "no reason is written down"
            lines.append(f"`{_label(row)}`: not kept: {', '.join(broken)}. {why}")
    return lines


def _no_branch(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in rows:
        oracle = row.get("oracle", {})
        what = [
            text.format(oracle[key])
            for key, text in (
                ("elsewhere", "{} calls drop a whole path"),
                ("unread", "{} calls whose result nobody reads"),
                ("partial", "{} calls drop more than what goes into the add"),
            )
            if oracle.get(key)
        ]
        if what:
            why = reasons.paths(_label(row))
            lines.append(f"`{_label(row)}`: {', '.join(what)}." + (f" {why}" if why else ""))
    return lines


def _some(items: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(f"`{item}`" for item in items[:most])
    return f" ({shown}{', …' if len(items) > most else ''})"


# --- cells ---------------------------------------------------------------------------------------

HEADER = ("model", "M params", "sites", "skipped adds", "native", "oracle", "option", "rule",
          "train", "promises")  # fmt: skip


def _all(rows: Iterable[Row], source: str) -> list[tuple[str, ...]]:
    chosen = [row for row in rows if row["source"] == source]
    return [_cells(row) for row in sorted(chosen, key=lambda row: (row["family"], row["name"]))]


def _cells(row: Row) -> tuple[str, ...]:
    name = f"`{row['name']}`<br>{row['family']}"
    if row["status"] != "ok" or not row.get("traced"):
        text = row["status"] if row["status"] != "ok" else "not traced"
        return (name, _millions(row), text, *[""] * (len(HEADER) - 3))
    oracle = row.get("oracle")
    judgement = ""
    if oracle:
        judgement = _judgement(oracle)
    return (
        name,
        _millions(row),
        _counts(row["sites"]) or "none",
        _counts(row["skipped"]),
        "" if oracle is None else str(oracle["native"]),
        judgement,
        _option(oracle["option"]) if oracle else "",
        _rule(row) if oracle and oracle["residual"] else "",
        _train(row),
        _kept(row),
    )


def _judgement(oracle: Row) -> str:
    if not oracle["residual"]:
        return "no branch dropped"
    best = oracle["best"]
    if best["exact"]:
        return "exact"
    return "found" if best["found"] else f"misses {len(best['missed'])}"


def _millions(row: Row) -> str:
    return f"{row['parameters'] / 1e6:.1f}" if "parameters" in row else ""


def _counts(counts: dict[str, int]) -> str:
    return "<br>".join(f"{number} {text}" for text, number in sorted(counts.items()))


def _option(option: Row) -> str:
    if "example_inputs" in option:
        return f"`example_inputs` of {tuple(option['example_inputs'])}"
    if "include" in option:
        return f"`include={tuple(option['include'])}`"
    if "where" in option:
        where = option["where"]
        return f"`where={where[0] if len(where) == 1 else tuple(where)!r}`"
    return ""


def _rule(row: Row) -> str:
    rules = row["oracle"].get("rules")
    if rules is None:
        return ""
    if not rules:
        return "no rule"
    train = row.get("run", {}).get("train", {})
    first = train["by"] if train and _same_by_rule(row) else rules[0]
    return f"{first['rule']}({1 - first['rate']:.4g}), {first['unit']}"


def _train(row: Row) -> str:
    train = row.get("run", {}).get("train")
    if train is None:
        return ""
    if train["identical"]:
        return "= by table" if train["by"]["rule"] == "table" else "="
    return f"differs by {train['difference']:.1g}"


def _kept(row: Row) -> str:
    if "run" not in row:
        return "not run"
    broken = [key for key in PROMISES if not row["run"].get(key, False)]
    return "not " + ", ".join(broken) if broken else "kept"


def _label(row: Row) -> str:
    return f"{row['source']}:{row['name']}"


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items) if items else "None."


# --- on the terminal -----------------------------------------------------------------------------


def short(rows: Sequence[Row]) -> str:
    """Return what a terminal shows: the summary, and what is not as asked."""
    lines = [f"{a:70} {b:8} {c}" for a, b, c in _summary(rows)]
    lines += [f"{text:70} {'':8} {share}" for text, share in _promises(rows)]
    sections = {
        "not exact": _not_exact(rows),
        "not identical by a rule": _not_identical(rows),
        "failed": _failures(rows),
    }
    for title, items in sections.items():
        lines += ["", f"{title} ({len(items)}):", *(f"  {item}" for item in items)]
    kinds = Counter(row["status"] for row in rows)
    return "\n".join([*lines, "", f"rows: {dict(kinds)}"])
