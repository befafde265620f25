"""The page of what `verify` is trusted for, from documents of the scripts that measure."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.verify_page import SECTIONS, page

RATIOS = {"rmse": 1.0, "max": 1.5, "typical": 1.0, "mean": 1.2}
LIMITS = {"rmse": 3.0, "max": 5.0, "typical": 3.0, "mean": 4.0}


MUTANTS = {
    "judges": ["dropsurgery", "cosine"],
    "groups": {"eps": "attributes"},
    "networks": {
        "resnet": {
            "eps": {
                "applies": True,
                "effect": 1e4,
                "caught": {"dropsurgery": True, "cosine": False},
                "module": "bn",
                "found": "bn",
                "right": True,
            }
        }
    },
}


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    text = page(tmp_path)
    for title, name, command, _ in SECTIONS:
        assert f"## {title}" in text
        assert f"Not measured yet: `{command}` writes docs/{name}." in text


def test_the_mutation_score_stands_under_one_heading(tmp_path: Path) -> None:
    (tmp_path / "mutants.json").write_text(json.dumps(MUTANTS))
    text = page(tmp_path)
    assert text.count("## Mutation score") == 1
    assert "caught **1 of 1**" in text


def test_false_alarms_and_limits_are_told(tmp_path: Path) -> None:
    export = {"model": "a", "ok": True, "ratios": RATIOS, "limits": LIMITS, "own": 1e-6}
    rows = [
        {**export, "algebra": None},
        {**export, "model": "b", "ok": False, "algebra": 1e-7},
    ]
    (tmp_path / "verify_gate.json").write_text(json.dumps({"rows": rows}))
    found = [
        {"label": "a", "status": "equal", "ratios": {"rmse": 0.3}},
        {"label": "b", "status": "differs", "ratios": {"rmse": 2.0}, "problems": ["rmse ratio 6"]},
        {"label": "c", "status": "not exported", "why": "no operator"},
    ]
    (tmp_path / "verify_zoo.json").write_text(json.dumps({"of": 9, "rows": found}))
    text = page(tmp_path)
    assert "2 exports that are right (2 networks" in text
    assert "1 false alarms" in text
    assert "| max | 1.50 | 1.50 | 5.0 | 30 % |" in text
    assert "3 of 9 models of the zoo" in text
    assert "that an equal file used: rmse 30 %" in text
    assert "### Not equal\n\n| model |  | why |\n| --- | --- | --- |\n| b | differs | rmse" in text
    assert "| c | not exported | no operator |" in text


def test_the_costs_are_told_in_runs(tmp_path: Path) -> None:
    seconds = {"verify": 2.0, "setup": 0.2, "plain": 0.3, "float64": 0.9, "locate": 3.0}
    row = {"model": "resnet50", "size": 96, "inputs": 7, "seconds": seconds, "ratio": 0.74}
    row |= {"range": [0.7, 0.8], "plain_runs": 3.7, "locating": 1.5, "locating_range": [1.2, 1.8]}
    document = {
        "versions": {"torch": "2.13", "python": "3.11", "threads": 1},
        "repeat": 3,
        "allowed_plain_runs": 6,
        "allowed_locating": 3,
        "models": [row],
    }
    (tmp_path / "verify_cost.json").write_text(json.dumps(document))
    text = page(tmp_path)
    told = "| resnet50 | 96 px | 7 | 0.30 s | 0.90 s | 2.00 s | 3.7 | 0.74 (0.70 to 0.80) |"
    assert told in text
    assert "allowed are 3 times the time of `verify`" in text
    assert "| resnet50 | 2.00 s | 3.00 s | 1.50 (1.20 to 1.80) |" in text
    assert "1 thread, medians of 3 rounds" in text
