"""Forwards that ask for sizes: example inputs answer, and the graph holds later inputs to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import TraceError
from dropsurgery.graph.module import HISTORY


class Windows(nn.Module):
    """A block that pads its map to whole windows where it must, as TinyViT's does."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1], x.shape[2]
        branch = self.drop(self.fc(self.norm(x)))
        if H % self.size or W % self.size:
            branch = F.pad(branch, (0, 0, 0, -W % self.size, 0, -H % self.size)).relu()
            branch = branch[:, :H, :W]
        elif x.ndim == 4 and H > 100:
            branch = branch * 2
        return x + branch.relu()


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.ones(x.shape[0], 1) + torch.zeros(x.shape[0], x.shape[1]) + torch.ones(1)


def test_without_examples_the_error_asks_for_them() -> None:
    with pytest.raises(TraceError, match="pass example_inputs, which answer questions about sizes"):
        ds.trace(Windows())


@pytest.mark.parametrize("side", [6, 8])
def test_examples_decide(side: int) -> None:
    model = Windows().eval()
    x = torch.randn(2, side, side, 6)
    module = ds.trace(model, example_inputs=x)
    assert torch.equal(module(x), model(x))
    for batch in (1, 5):
        other = torch.randn(batch, side, side, 6)
        assert torch.equal(module(other), model(other))
    assert len(ds.find_residuals(module).sites) == 1
    torch.manual_seed(0)
    trained = module.train()(x)
    torch.manual_seed(0)
    assert torch.equal(trained, model.train()(x))


@pytest.mark.parametrize(("side", "other"), [(6, 8), (8, 6), (8, 104)])
def test_other_sizes_are_refused_when_the_graph_runs(side: int, other: int) -> None:
    module = ds.trace(Windows(), example_inputs=torch.randn(2, side, side, 6))
    with pytest.raises(AssertionError, match="traced for other input sizes"):
        module(torch.randn(2, other, other, 6))


def test_a_question_about_values_stays_an_error() -> None:
    class Values(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="control flow"):
        ds.trace(Values(), example_inputs=torch.randn(2, 3))


def test_a_saved_surgery_is_loaded_with_the_same_answers(tmp_path: Path) -> None:
    model = Windows().eval()
    x = torch.randn(2, 6, 6, 6)
    insertion = ds.InsertDropPath(ds.survival.constant(0.5))
    net = ds.apply(model, insertion, example_inputs=x).module
    assert net.meta[HISTORY]["inputs"]["examples"] == [{"shape": [2, 6, 6, 6], "dtype": "float32"}]
    ds.save(net, tmp_path / "net")
    loaded = ds.load(tmp_path / "net", model)
    assert loaded.code == net.code
    assert torch.equal(loaded.eval()(x), model(x))


def test_examples_that_decide_nothing_are_not_remembered() -> None:
    module = ds.trace(nn.Sequential(nn.Linear(3, 3)), example_inputs=torch.randn(2, 3))
    assert "examples" not in module.meta[HISTORY]["inputs"]


def test_tensors_are_made_of_traced_sizes() -> None:
    module = ds.trace(Counts())
    for batch in (2, 3):
        x = torch.randn(batch, 4)
        assert torch.equal(module(x), Counts()(x))
    assert torch.ones(2).tolist() == [1.0, 1.0]  # torch's own function is back in its place


def test_what_a_layer_keeps_holds_no_tensor_without_values() -> None:
    class Keeps(nn.Linear):
        kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = torch.arange(x.shape[1]).to(x)
            return super().forward(x) + self.kept

    model = nn.Sequential(Keeps(4, 4)).eval()
    module = ds.trace(model, example_inputs=torch.randn(2, 4), leaf_modules=(Keeps,))
    x = torch.randn(3, 4)
    assert torch.equal(module(x), model(x))
