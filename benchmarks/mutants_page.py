"""The section of docs/verify.md that tells what `benchmarks/mutants.py` measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import table

# Where a float64 run of the mutant is further off than this many times the network's own error in
# float32, it is a defect; a comparison of float32 outputs cannot tell less from rounding.
REAL = 4.0
SAME = 1e-3
Record = dict[str, Any]


def section(document: dict[str, Any]) -> str:
    """Return the section as Markdown.

    Args:
        document: the content of docs/mutants.json.
    """
    records = [
        (network, kind, record)
        for network, kinds in document["networks"].items()
        for kind, record in kinds.items()
        if record["applies"]
    ]
    real = [entry for entry in records if is_real(entry[2])]
    judges = document["judges"]
    parts = [
        "## Mutation score",
        _opening(document, records, real),
        _scores(document["groups"], real, judges),
        _networks(document["networks"], real),
        _small(records),
        _exceptions("Defects that `verify` missed", [e for e in real if not _caught(e[2])]),
        _exceptions(
            "Places that were told wrong",
            [e for e in real if _caught(e[2]) and not e[2].get("right")],
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_real(record: Record) -> bool:
    """Say whether a mutant is a defect; one that changes names, shapes or dtypes always is."""
    return record["effect"] is None or record["effect"] > REAL


def _caught(record: Record, judge: str = "dropsurgery") -> bool:
    return bool(record["caught"][judge])


def _opening(document: dict[str, Any], records: list[Any], real: list[Any]) -> str:
    kinds = {kind for _, kind, _ in records}
    caught = sum(_caught(record) for *_, record in real)
    placed = [record for *_, record in real if _caught(record)]
    right = sum(bool(record.get("right")) for record in placed)
    absent = sum(
        not record["applies"]
        for kinds in document["networks"].values()
        for record in kinds.values()
    )
    return (
        f"{len(kinds)} kinds of defect in {len(document['networks'])} small networks with random "
        f"weights and statistics: {len(records)} mutants ({absent} kinds did not apply to a "
        f"network). In float64, by ONNX's reference implementation, {len(real)} of them move an "
        f"output by more than {REAL:g} times the network's own float32 error (or the spacing of "
        "float32 numbers, where that is more), or change a name, "
        "a shape or a dtype: these are the defects. "
        f"`ds.verify` caught **{caught} of {len(real)}**; `ds.locate` named the module that was "
        f"changed for **{right} of {len(placed)}** ({_share(right, len(placed))}). The other "
        "comparisons were given the same inputs, but for those next to zero, and count as right "
        "where one input is enough. `python -m benchmarks.mutants` makes the figures."
    )


def _scores(groups: dict[str, str], real: list[Any], judges: list[str]) -> str:
    rows = []
    for group in dict.fromkeys(groups.values()):
        inside = [record for _, kind, record in real if groups.get(kind) == group]
        if inside:
            rows.append([group, len(inside), *_shares(inside, judges)])
    rows.append(["**all**", len(real), *_shares([record for *_, record in real], judges)])
    return table(["defects in", "mutants", *judges], rows)


def _shares(records: list[Record], judges: list[str]) -> list[str]:
    return [_share(sum(_caught(r, judge) for r in records), len(records)) for judge in judges]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _networks(networks: dict[str, Any], real: list[Any]) -> str:
    rows = []
    for name, kinds in networks.items():
        here = [record for network, _, record in real if network == name]
        caught = [record for record in here if _caught(record)]
        right = sum(bool(record.get("right")) for record in caught)
        seconds = sum(record.get("seconds", 0.0) for record in kinds.values() if record["applies"])
        places = sum(record.get("seconds_to_locate", 0.0) for record in kinds.values())
        rows.append([name, len(here), len(caught), right, f"{seconds:.0f} s", f"{places:.0f} s"])
    columns = ["network", "defects", "caught", "place right", "verifying", "locating"]
    return table(columns, rows)


def _small(records: list[Any]) -> str:
    """Tell of what is no defect by float64."""
    small = [record for *_, record in records if not is_real(record)]
    same = [record for record in small if record["effect"] <= SAME]
    alarms = sum(_caught(record) for record in same)
    between = [record for record in small if record["effect"] > SAME]
    return (
        f"{len(same)} mutants compute the same in float64 (a weight that only zeros reach, a ReLU "
        f"applied twice, an overflow of float32 alone): `verify` called {alarms} of them "
        "different, for a dtype, or for values that are not finite in float32. "
        f"{len(between)} more move the outputs by less than {REAL:g} times the network's own "
        f"rounding; {sum(_caught(record) for record in between)} of these were caught."
    )


def _exceptions(title: str, entries: Iterable[Any]) -> str:
    rows = [
        [network, kind, _effect(record), f"`{record['module']}`", _told(record)]
        for network, kind, record in entries
    ]
    if not rows:
        return ""
    columns = ["network", "defect", "effect", "changed", "told"]
    return f"### {title}\n\n" + table(columns, rows)


def _effect(record: Record) -> str:
    return "shape" if record["effect"] is None else f"{record['effect']:.2g}"


def _told(record: Record) -> str:
    return f"`{record['found']}`" if record.get("found") is not None else "-"
