"""expected_compute counts what runs, and what is saved of it."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, TraceError

X = torch.randn(8, 3, 64, 64)


def insert(model: nn.Module, mode: str, final: float = 0.5) -> nn.Module:
    insertion = ds.InsertDropPath(ds.survival.linear(final), mode=mode, break_even=0.0)  # type: ignore[arg-type]
    return ds.apply(model, insertion).module


def counted(module: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "convnext_tiny"])
def test_the_total_is_that_of_a_real_forward(name: str) -> None:
    model = getattr(torchvision.models, name)()
    found = ds.expected_compute(insert(model, "row"), (X,))
    assert found.total == counted(model.train(), X)
    assert found.expected == found.total
    assert found.ratio == 1.0
    assert found.batch == 8


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "convnext_tiny"])
def test_a_subset_runs_what_is_said(name: str) -> None:
    net = insert(getattr(torchvision.models, name)(), "subset").train()
    found = ds.expected_compute(net, (X,))
    assert 0.5 < found.ratio < 0.95
    for layer in net.modules():
        if isinstance(layer, ds.DropPath):  # a round number of rows: every step costs the same
            layer.drop_prob = math.floor(8 * layer.drop_prob) / 8
    found = ds.expected_compute(net, (X,))
    assert 0.5 < found.ratio < 0.95
    assert counted(net, X) == pytest.approx(found.expected, rel=1e-9)


def test_a_fraction_of_a_row_runs_at_its_rate() -> None:
    block = nn.Sequential(Residual())
    net = ds.apply(block, ds.InsertDropPath(lambda l, total: 0.7, mode="subset", break_even=0.0))
    x = torch.randn(8, 4)
    found = ds.expected_compute(net.module, (x,))
    assert [site.run for site in found.sites] == pytest.approx([0.7])
    torch.manual_seed(0)
    costs = torch.tensor([counted(net.module.train(), x) for _ in range(400)]).double()
    assert set((costs / (2 * 4 * 4)).tolist()) == {5.0, 6.0}
    assert abs(costs.mean() - found.expected) < 4 * costs.std() / 400**0.5
    # Of one or two rows none is left out.
    sites = ds.expected_compute(net.module, (x[:2],)).sites
    assert sites[0].reason == "masked: ceil(2 · 0.7) is all of them"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


def test_whole_batches_run_at_their_rate() -> None:
    net = insert(torchvision.models.resnet18(), "batch").train()
    found = ds.expected_compute(net, (X,))
    assert [site.run for site in found.sites] == pytest.approx([1 - l / 16 for l in range(1, 9)])
    torch.manual_seed(0)
    small = X[:, :, :32, :32]
    costs = [counted(net, small) for _ in range(150)]
    expected = ds.expected_compute(net, (small,)).expected
    spread = torch.tensor(costs, dtype=torch.float64).std() / len(costs) ** 0.5
    assert abs(sum(costs) / len(costs) - expected) < 4 * spread


def test_branches_inside_branches_multiply() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.outer(x))
            return x + torch.tanh(y + torch.tanh(self.inner(y)))

    insertion = ds.InsertDropPath(
        ds.survival.constant(0.5), mode="subset", include=("nested",), break_even=0.0
    )
    net = ds.apply(Block(), insertion).module.train()
    x = torch.randn(8, 4)
    found = ds.expected_compute(net, (x,))
    linear = 2 * 8 * 4 * 4
    assert found.total == 2 * linear
    assert found.expected == 0.5 * linear + 0.25 * linear == counted(net, x)


def test_what_saves_nothing_is_said() -> None:
    net = ds.retrofit(torchvision.models.resnet18(), 0.5, mode="subset")
    net.layer1[0].drop_path.drop_prob = 0.01
    net.layer1[1].drop_path.break_even = 0.0
    found = ds.expected_compute(net, (X[:2],))
    reasons = [site.reason for site in found.sites]
    assert reasons[0] == "masked: below the break-even"
    assert reasons[1] == "masked: ceil(2 · 0.875) is all of them"
    assert found.sites[0].run == 1.0
    assert "layer1.0.drop_path" in str(found)
    assert "saved)" in str(found)


def test_a_network_without_drop_path() -> None:
    found = ds.expected_compute(torchvision.models.resnet18(), (X,))
    assert found.sites == ()
    assert found.ratio == 1.0


def test_nothing_is_computed_and_nothing_changes() -> None:
    net = insert(torchvision.models.resnet18(), "subset").train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    ds.expected_compute(net, (X,))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.training


def test_bad_inputs() -> None:
    net = insert(torchvision.models.resnet18(), "subset")
    with pytest.raises(TraceError, match="the example inputs do not fit the network"):
        ds.expected_compute(net, (torch.randn(2, 4, 64, 64),))

    class Constant(nn.Module):
        def forward(self, n: int) -> Tensor:
            return torch.ones(2) * n

    with pytest.raises(ArgumentError, match="an input tensor with a batch axis"):
        ds.expected_compute(Constant(), (3,))
