"""Outputs of every kind: nested, integer, of half precision, of a shape that the data decide."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery.verify.gate import Tally, unit

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


# Nested


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """A dataclass that is a dict of what is not None, as transformers returns it."""

    logits: Tensor | None = None
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class Nested(nn.Module):
    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 5)
        self.shift = shift

    def forward(self, x: Tensor) -> ModelOutput:
        y = self.fc(x)
        return ModelOutput(logits=y, hidden_states=(x * 2, (y + self.shift).tanh()))


def test_an_output_that_is_dict_and_dataclass() -> None:
    verdict = ds.verify(Nested(), Nested(), X)
    assert verdict.ok
    assert [o.name for o in verdict.outputs] == ["logits", "hidden_states_0", "hidden_states_1"]
    verdict = ds.verify(Nested(), Nested(1e-4), X)
    assert [o.name for o in verdict.outputs if not o.ok] == ["hidden_states_1"]


def test_nested_outputs_of_a_file(tmp_path: Path) -> None:
    class Plain(Nested):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            found = super().forward(x)
            return {"logits": found.logits, "more": found.hidden_states}

    path = ds.export_onnx(Plain().eval(), tmp_path / "m.onnx", X)
    verdict = ds.verify(Plain(), path)
    assert verdict.ok, str(verdict)
    assert [o.name for o in verdict.outputs] == ["logits", "more_0", "more_1"]
    verdict = ds.verify(Plain(1e-4), path)
    assert [o.name for o in verdict.outputs if not o.ok] == ["more_1"]


# Shapes that the data decide


class Kept(nn.Module):
    def __init__(self, limit: float = 0.0) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[x > self.limit].exp(), torch.nonzero(x > self.limit)


def test_a_shape_that_depends_on_the_data() -> None:
    assert ds.verify(Kept(), Kept(), X).ok
    verdict = ds.verify(Kept(), Kept(0.5), X)
    assert "shape" in verdict.outputs[0].reason


def test_a_shape_that_depends_on_rounding_is_left_out() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[: 3 if x.dtype == torch.float64 else 2] + x.sum()

    verdict = ds.verify(Half(), Half(), [X, X + 1], batch_sizes=(4,))
    assert not verdict.ok  # nothing was left to compare
    assert any("the shape of an output depends on rounding" in note for note in verdict.notes)


def test_a_shape_of_the_float64_run_is_no_shape_to_compare_with() -> None:
    tally = Tally(torch.float32)
    tally.add(torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(2), "here")
    assert tally.problem == "the reference's shape is another one in float64: (3,) (here)"


# Integers


def test_what_the_float64_run_returns_is_no_error() -> None:
    numbers, tie = torch.tensor([3, 1, 2]), torch.tensor([3, 0, 2])
    tally = Tally(torch.int64)
    tally.add(numbers, tie, tie, "a tie that the reference rounds the other way")
    assert tally.differing == 0
    tally.add(numbers, numbers, tie, "no tie")
    assert tally.differing == 1
    tally.add(numbers, tie, torch.tensor([3, 5, 2]), "neither of the two")
    assert tally.differing == 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_exact_outputs_of_a_file(tmp_path: Path, dtype: torch.dtype) -> None:
    class Counts(nn.Module):
        def __init__(self, edge: float) -> None:
            super().__init__()
            self.edge = edge

        def forward(self, x: Tensor) -> Tensor:
            return ((x > self.edge) + 0).to(dtype)

    path = ds.export_onnx(Counts(0.0).eval(), tmp_path / "m.onnx", X)
    verdict = ds.verify(Counts(0.0), path)
    assert verdict.ok, str(verdict)
    assert verdict.outputs[0].dtype == str(dtype).removeprefix("torch.")
    assert not ds.verify(Counts(0.3), path).ok


# Half precision


class Body(nn.Module):
    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(6, 32), nn.LayerNorm(32, eps=eps), nn.GELU(), nn.Linear(32, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_modules_of_every_precision(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    verdict = ds.verify(Body().to(dtype), Body().to(dtype), x)
    assert verdict.ok, str(verdict)
    assert verdict.outputs[0].dtype == str(dtype).removeprefix("torch.")
    # Ten units of rounding of each weight.
    changed = Body().to(dtype)
    with torch.no_grad():
        changed.layers[3].weight.add_(10 * unit(dtype))  # type: ignore[operator]
    assert not ds.verify(Body().to(dtype), changed, x).ok


def test_half_precision_in_a_file(tmp_path: Path) -> None:
    model = Body().half().eval()
    path = ds.export_onnx(model, tmp_path / "m.onnx", X.half())
    verdict = ds.verify(model, path)
    assert verdict.ok, str(verdict)
    assert not ds.verify(Body(eps=0.3).half(), path).ok
    wrong = ds.verify(Body(), tmp_path / "m.onnx", X)
    assert not wrong.ok
    assert "the candidate fails on yours" in wrong.problems[0]


def test_weights_rounded_to_half_precision_are_caught() -> None:
    rounded = Body()
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.half().float())
    verdict = ds.verify(Body(), rounded, X)
    assert not verdict.ok
    assert "error beyond rounding" in verdict.outputs[0].reason


# Sides that return something else each time


class Unsteady(nn.Module):
    """Noise that does not come from torch's generators."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return x * (1 + self.scale * self.calls[0])


@pytest.mark.parametrize("role", ["reference", "candidate"])
def test_a_side_that_is_not_steady_is_named(role: str) -> None:
    pair = [Unsteady(0.0), Unsteady(0.0)]
    pair[role == "candidate"] = Unsteady(1e-3)
    verdict = ds.verify(*pair, X)
    assert not verdict.ok
    other = {"reference": "candidate", "candidate": "reference"}[role]
    assert f"the {role} returns other values when it is called again" in " ".join(verdict.notes)
    assert f"the {other} returns" not in " ".join(verdict.notes)


def test_a_batch_that_the_reference_cannot_average_is_left_out() -> None:
    class Spread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            # Not a number for one row.
            return x / (x.var(0, correction=min(1, len(x) - 1)) / (len(x) - 1))

    verdict = ds.verify(Spread(), Spread(), X)
    assert verdict.ok, str(verdict)
    assert any("the reference returns NaN on it" in note for note in verdict.notes)


# Weights beside the file


def test_a_file_with_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dropsurgery import onnx_writer

    monkeypatch.setattr(onnx_writer, "ONE_FILE_LIMIT", 100)
    path = ds.export_onnx(Body().eval(), tmp_path / "m.onnx", X)
    assert (tmp_path / "m.onnx.data").stat().st_size > 1000
    assert ds.verify(Body(), path).ok
    with open(tmp_path / "m.onnx.data", "r+b") as file:
        file.seek(40)
        file.write(b"\x00\x00\x00\x40")
    assert not ds.verify(Body(), path).ok
