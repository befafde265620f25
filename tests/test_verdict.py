"""How a verdict is printed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import dropsurgery as ds
from dropsurgery.verify.verdict import KINDS, Verdict


@pytest.fixture(scope="module")
def verdict() -> Verdict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4)).eval()
    return ds.verify(model, model, (torch.randn(3, 6),))


def test_one_table_where_it_fits_and_two_where_not(verdict: Verdict) -> None:
    wide, narrow = verdict.table(160).splitlines(), verdict.table(80).splitlines()
    assert sum(line.startswith("output ") for line in wide) == 2  # the heading and the output
    assert wide[1].split() == [
        "output",
        "dtype",
        "shape",
        "own",
        "error",
        "error",
        *KINDS,
        "verdict",
    ]
    assert max(map(len, narrow)) <= 80
    headings = [line.split() for line in narrow if line.startswith("output   ")]
    assert headings[0] == ["output", "dtype", "shape", "own", "error", "error", "verdict"]
    assert headings[2] == ["output", *KINDS]
    # Whatever the width, every cell is told.
    assert {*" ".join(wide).split()} - {*" ".join(narrow).split()} == {wide[2]}  # the longer rule


def test_lines_are_wrapped_for_a_terminal_and_left_whole_for_a_message(verdict: Verdict) -> None:
    note = "a long note " * 20
    noted = dataclasses.replace(verdict, notes=(note.strip(),))
    assert f"note: {note.strip()}" in str(noted).splitlines()
    assert max(map(len, noted.table(60).splitlines())) <= 60
    assert " ".join(note.split()) in " ".join(noted.table(60).split())
    assert noted.table(60).endswith("\nEQUIVALENT")
