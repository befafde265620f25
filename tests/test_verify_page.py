"""The page of what `verify` is trusted for, from documents of the scripts that measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.verify_page import SECTIONS, mutants, page

RATIOS = {"rmse": 1.0, "max": 1.5, "typical": 1.0, "mean": 1.2}
LIMITS = {"rmse": 3.0, "max": 5.0, "typical": 3.0, "mean": 4.0}


def record(effect: float | None, ours: bool, cosine: bool, right: bool = True) -> dict[str, Any]:
    caught = {"dropsurgery": ours, "cosine": cosine}
    return {"applies": True, "effect": effect, "caught": caught, "right": right}


MUTANTS = {
    "judges": ["dropsurgery", "cosine"],
    "groups": {"eps": "attributes", "swap": "wiring", "nothing": "attributes"},
    "networks": {
        "resnet": {
            "eps": record(1e4, True, False),
            "swap": record(None, True, True, right=False),
            "nothing": record(1.0, False, False),
            "other": {"applies": False},
        }
    },
}


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    text = page(tmp_path)
    for title, name, command, _ in SECTIONS:
        assert f"## {title}" in text
        assert f"Not measured yet: `{command}` writes docs/{name}." in text


def test_mutants_are_counted_by_group() -> None:
    text = mutants(MUTANTS)
    assert "3 mutants: 3 kinds of defect in 1 networks. 2 move an output" in text
    assert "| attributes | 1 | 1 | 0 |" in text
    assert "| all | 2 | 2 | 1 |" in text
    assert "Not caught by dropsurgery: none. Of the 1 others, 0 were reported" in text
    assert "found in 1 of 2 (50.0 %)" in text


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
    assert "rmse 200 %" in text
    assert "### Not equal\n\n| model |  | why |\n| --- | --- | --- |\n| b | differs | rmse" in text
    assert "| c | not exported | no operator |" in text
