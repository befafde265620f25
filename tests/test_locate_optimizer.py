"""Files that are right, and that onnxruntime's optimiser makes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dropsurgery as ds
from benchmarks.found import pad_max_pool
from dropsurgery.verify.cases import Case
from dropsurgery.verify.optimizer import blame


def exported(folder: Path, bias: float) -> tuple[nn.Module, Path]:
    """Return a network that pads with zeros before it pools, and its file."""
    torch.manual_seed(0)
    model = pad_max_pool.network(bias)
    return model, ds.export_onnx(model, folder / "m.onnx", torch.randn(2, 3, 9, 9))


def test_the_optimiser_is_blamed(tmp_path: Path) -> None:
    model, path = exported(tmp_path, -5.0)
    assert not ds.verify(model, path).ok
    place = ds.locate(model, path)
    assert not place.found
    assert "right without its optimiser and wrong from ORT_ENABLE_BASIC on" in place.conclusion
    assert place.reason in place.table(100).replace("\n  ", " ")
    assert place.to_json()["reason"] == place.reason
    with pytest.raises(AssertionError, match=r"without its\s+optimiser"):
        ds.testing.assert_equivalent(model, path)


def test_nobody_is_blamed_where_the_padding_changes_nothing(tmp_path: Path) -> None:
    model, path = exported(tmp_path, 5.0)
    assert ds.verify(model, path).ok
    place = ds.locate(model, path)
    assert (place.found, place.reason) == (False, "")


def test_a_file_that_is_wrong_without_the_optimiser_is_no_case_for_it(tmp_path: Path) -> None:
    _, path = exported(tmp_path, -5.0)
    other = pad_max_pool.network(5.0)
    case = Case("one", (torch.randn(2, 3, 9, 9),), {})
    assert blame(other, path, "cpu", [case]) == ""


def test_the_script_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    pad_max_pool.main()
    assert "NOT EQUIVALENT" in capsys.readouterr().out
