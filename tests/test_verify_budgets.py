"""Two budgets: surgery in float64 against float64, and what rounding may add; and other figures."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery.errors import ArgumentTypeError
from dropsurgery.verify.algebra import EXACT, Algebra, AlgebraTally, rounded_anew
from dropsurgery.verify.figures import FigureTally
from tests.helpers import randomize


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    randomize(model, 0)
    return model.eval()


X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def algebra(reference: nn.Module, candidate: Any, x: Tensor = X, **options: Any) -> Algebra:
    found = ds.verify(reference, candidate, x, **options).outputs[0].algebra
    assert found is not None
    return found


# Two modules


def test_taking_layers_out_is_exact() -> None:
    model = net()
    retrofitted = ds.retrofit(model, final_survival=0.5)
    for candidate in (retrofitted, copy.deepcopy(model)):
        found = algebra(model, candidate)
        assert (found.error, found.limit, found.rounded) == (0.0, EXACT, "")


def test_folding_in_float64_is_exact_and_in_float32_is_rounded() -> None:
    model = net()
    found = algebra(model, ds.slim(model))
    assert found.ok
    assert found.rounded == "float32"
    assert EXACT < found.error < found.limit < 1e-5
    model = model.double()
    found = algebra(model, ds.slim(model), X.double())
    assert 0 < found.error < found.limit == EXACT
    assert found.rounded == "float64"


def test_a_change_far_below_float32_is_caught() -> None:
    model = net()
    changed = copy.deepcopy(model)
    changed.blocks[1].bn.eps *= 1.001  # type: ignore[union-attr,operator]
    verdict = ds.verify(model, changed, X)
    assert not verdict.ok
    (output,) = verdict.outputs
    assert all(ratio.ok for ratio in output.ratios)  # rounding hides it
    assert "not the same algebra: float64 against float64 differs by" in output.reason
    assert "algebra of output: " in str(verdict)
    assert " > 1e-12 in float64" in str(verdict)


def test_a_new_weight_is_held_to_the_rounding_of_its_dtype() -> None:
    model = net()
    changed = copy.deepcopy(model)
    weight = changed.fc.weight
    with torch.no_grad():
        weight.copy_(torch.nextafter(weight, torch.tensor(9.0)))
    found = algebra(model, changed)
    assert found.ok
    assert found.error > EXACT
    weight.data *= 1 + 3e-6
    assert not algebra(model, changed).ok


def test_reordered_operations_are_the_same_algebra() -> None:
    class Sum(nn.Module):
        def __init__(self, left: bool) -> None:
            super().__init__()
            self.left = left

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = x.sin(), x.cos(), x.tanh()
            return (a + b) + c if self.left else a + (b + c)

    found = algebra(Sum(True), Sum(False))
    assert 0 < found.error < 1e-15


def test_the_limit_grows_where_the_network_magnifies_rounding() -> None:
    tally = AlgebraTally(error=5e-12, own=1e-3)
    assert tally.weigh(torch.float32, None).ok
    assert not AlgebraTally(error=5e-12, own=1e-6).weigh(torch.float32, None).ok
    # In float64 nothing more exact is at hand.
    assert AlgebraTally(own=1e-3).weigh(torch.float64, torch.float64).limit == EXACT


def test_what_is_no_matter_of_numbers() -> None:
    tally = AlgebraTally()
    x = torch.ones(2, dtype=torch.float64)
    tally.add(x, x[:1], 0.0, "first")
    assert tally.problem == "shape (1,) instead of (2,) in float64 (first)"
    tally = AlgebraTally()
    tally.add(x, x / 0, 0.0, "first")
    assert tally.problem == "other values are finite in float64 (first)"


def test_new_weights_are_told_from_shared_and_renamed_ones() -> None:
    model = net()
    assert rounded_anew(model, copy.deepcopy(model)) is None
    renamed = nn.ModuleDict({"other": copy.deepcopy(model.blocks)})
    assert rounded_anew(model, renamed) is None
    renamed.register_buffer("mask", torch.full((3,), 0.1, dtype=torch.float16))
    assert rounded_anew(model, renamed) == torch.float16
    assert rounded_anew(model, copy.deepcopy(model).double()) == torch.float64
    plain = nn.Identity()
    plain.constant = torch.rand(3)
    assert rounded_anew(model, plain) == torch.float32


def test_a_candidate_that_does_not_run_in_float64_is_noted() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise RuntimeError("no double here")
            return x * 2

    class Easy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    verdict = ds.verify(Easy(), Picky(), X)
    assert verdict.ok
    assert verdict.outputs[0].algebra is None
    assert "no float64 run of the candidate: no double here" in verdict.notes


# By way of a surgered network to a file


@pytest.fixture(scope="module")
def slim_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ds.export_onnx(ds.slim(net()), tmp_path_factory.mktemp("slim") / "m.onnx", X)


def test_a_file_is_held_to_both_budgets(slim_file: Path) -> None:
    model = net()
    assert ds.verify(model, slim_file).outputs[0].algebra is None
    verdict = ds.verify(model, slim_file, surgered=ds.slim(model))
    assert verdict.ok, str(verdict)
    assert verdict.reference.startswith("Net by way of ")
    (output,) = verdict.outputs
    assert output.algebra is not None
    assert EXACT < output.algebra.error < output.algebra.limit
    assert output.ratios[0].value < 2


def test_each_budget_fails_by_itself(slim_file: Path) -> None:
    model = net()
    other = net()
    other.blocks[2].bn.eps *= 100  # type: ignore[union-attr,operator]
    # The surgery is wrong, the file is its network.
    verdict = ds.verify(other, slim_file, surgered=ds.slim(model))
    assert not verdict.ok
    assert all(ratio.ok for ratio in verdict.outputs[0].ratios)
    assert "not the same algebra" in verdict.outputs[0].reason
    # The surgery is right, the file is another network.
    verdict = ds.verify(other, slim_file, surgered=ds.slim(other))
    assert not verdict.ok
    found = verdict.outputs[0].algebra
    assert found is not None
    assert found.ok
    assert "error beyond rounding" in verdict.outputs[0].reason


def test_surgered_is_for_files(slim_file: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="surgered is a Net beside a Net"):
        ds.verify(net(), net(), X, surgered=net())
    with pytest.raises(ArgumentTypeError, match="surgered is a str"):
        ds.verify(net(), slim_file, X, surgered="slim")  # type: ignore[arg-type]


# Figures of other tools


def test_figures_are_told_and_decide_nothing() -> None:
    model, changed = net(), net()
    changed.fc.weight.data += 3e-6
    verdict = ds.verify(model, changed, X)
    assert not verdict.ok
    figures = verdict.outputs[0].figures
    assert figures is not None
    assert figures.top1 == 1.0  # what others look at sees nothing
    assert figures.sqnr is not None
    assert 90 < figures.sqnr < 150
    assert 0 < figures.outside <= 1
    data = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert data["outputs"][0]["figures"]["max_abs"] == figures.max_abs
    assert data["outputs"][0]["algebra"]["limit"] > 0
    assert "SQNR dB" not in verdict.table(120)
    assert "SQNR dB" in verdict.table(120, figures=True)


def test_figures_by_hand() -> None:
    tally = FigureTally()
    assert tally.figures() is None
    one = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 2.0]])
    tally.add(one, one)
    found = tally.figures()
    assert found is not None
    assert (found.top1, found.sqnr, found.max_abs, found.max_rel, found.outside) == (
        1,
        None,
        0,
        0,
        0,
    )
    other = one.clone()
    other[0, 0] = 3.0
    tally.add(one, other)
    found = tally.figures()
    assert found is not None
    assert found.top1 == 0.75
    assert found.sqnr == pytest.approx(10 * torch.tensor(38 / 4).log10().item())
    assert (found.max_abs, found.max_rel) == (2.0, 2.0)
    assert found.outside == pytest.approx(1 / 12)


@pytest.mark.parametrize(
    ("shape", "choices"), [((2, 5), 2), ((2, 4, 5), 8), ((2, 5, 3, 3), 18), ((5,), 0), ((4, 1), 0)]
)
def test_where_the_classes_are(shape: tuple[int, ...], choices: int) -> None:
    tally = FigureTally()
    x = torch.rand(shape)
    tally.add(x, x)
    assert tally.choices == choices


def test_zeros_and_infinities_have_figures_too() -> None:
    tally = FigureTally()
    zeros = torch.zeros(2, 3)
    tally.add(zeros, zeros + 1)
    found = tally.figures()
    assert found is not None
    assert found.sqnr == -999.0
    infinite = torch.full((2, 3), -torch.inf)
    tally = FigureTally()
    tally.add(infinite, infinite)
    found = tally.figures()
    assert found is not None
    assert found.max_abs == 0.0


# Versions


def test_the_verdict_names_its_versions(slim_file: Path) -> None:
    import onnxruntime

    model = net()
    verdict = ds.verify(model, slim_file)
    assert verdict.environment["onnxruntime"] == onnxruntime.__version__
    assert verdict.environment["torch"] == torch.__version__
    assert f"onnxruntime {onnxruntime.__version__}" in str(verdict)
    assert "onnxruntime" not in ds.verify(model, model, X).environment
