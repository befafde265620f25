"""The variance that a BatchNorm sees behind a dropout: predicted, measured, and remedied."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError, DropsurgeryError, PassError
from dropsurgery.layers import ClassicDropout, GaussianDropout, MonteCarloDropout, UniformDropout
from tests.helpers import randomize


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Direct(nn.Module):
    """BatchNorm (mean c, deviation s) → dropout → BatchNorm: the paper's first case."""

    def __init__(self, drop: nn.Module, c: float = 0.0, s: float = 1.0) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.BatchNorm1d(4), drop, nn.BatchNorm1d(4)
        nn.init.constant_(self.first.bias, c)
        nn.init.constant_(self.first.weight, s)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.first(x)))


@pytest.mark.parametrize(("c", "s"), [(0.0, 1.0), (0.5, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_formula_of_the_paper(c: float, s: float, p: float) -> None:
    model = Direct(nn.Dropout(p), c, s)
    keep, v = 1 - p, s * s
    expected = v / ((c * c + v) / keep - c * c)
    (shift,) = ds.find_variance_shift(model)
    assert shift.path == "second"
    assert shift.dropouts == ("drop",)
    assert shift.predicted == pytest.approx(expected, rel=1e-9)
    torch.manual_seed(0)
    (measured,) = ds.find_variance_shift(model, [normal(4000, 4, seed=i) for i in range(3)])
    assert measured.predicted == pytest.approx(expected, rel=0.02)
    assert measured.by_dropout == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("layer", "variance"),
    [
        (GaussianDropout(0.3), 0.3 / 0.7),
        (UniformDropout(0.6), 0.6**2 / 3),
        (nn.Dropout(0.2), 0.2 / 0.8),
        (ClassicDropout(0.2), 0.2 / 0.8),
    ],
)
def test_every_kind_of_noise(layer: nn.Module, variance: float) -> None:
    torch.manual_seed(1)  # not the data's: noise drawn like the data would not be independent
    (shift,) = ds.find_variance_shift(Direct(layer, 1.0), [normal(20_000, 4)])
    assert shift.predicted == pytest.approx(1 / (1 + 2 * variance), rel=0.03)
    assert shift.by_dropout == pytest.approx(shift.predicted, rel=0.03)


def test_noise_that_eval_has_too_is_no_shift() -> None:
    for layer in (MonteCarloDropout(0.5), nn.Dropout(0.0), nn.Identity()):
        assert len(ds.find_variance_shift(Direct(layer))) == 0


class Weights(nn.Module):
    """Dropout → weights → BatchNorm, the paper's second case, beside concatenation and sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.4)
        self.conv = nn.Conv2d(3, 6, 1, groups=3)
        self.act = nn.ReLU()
        self.middle = nn.BatchNorm2d(6)
        self.last = nn.BatchNorm2d(12)
        self.tail = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.conv(self.drop(self.act(x)))
        z = self.middle(y)
        both = self.last(torch.cat([y, z], 1))
        return self.tail(both[:, :6]) + self.middle(F.avg_pool2d(y, 2).repeat(1, 1, 2, 2))


def test_weights_concatenation_and_pooling_carry_the_noise() -> None:
    torch.manual_seed(0)
    model = randomize(Weights())
    x = normal(4000, 3, 4, 4)
    theory = {s.path: s.predicted for s in ds.find_variance_shift(model)}
    found = {s.path: s for s in ds.find_variance_shift(model, [x])}
    assert set(found) == {"middle", "last"}
    for path in ("middle", "last"):
        if path == "last":
            assert found[path].by_dropout == pytest.approx(found[path].predicted, rel=0.02)
    # Without data, too: what comes in is normal and the units are independent, as assumed.
    assert theory["last"] == pytest.approx(found["last"].by_dropout, rel=0.05)


def test_residual_sums_add_noise() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("a", "b"):
                setattr(self, f"norm_{name}", nn.BatchNorm2d(4))
                setattr(self, f"drop_{name}", nn.Dropout(0.5))
                setattr(self, f"conv_{name}", nn.Conv2d(4, 4, 3, padding=1))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            for name in ("a", "b"):
                y = F.relu(getattr(self, f"norm_{name}")(x))
                x = x + getattr(self, f"conv_{name}")(getattr(self, f"drop_{name}")(y))
            return self.norm(x)

    torch.manual_seed(0)
    shifts = list(ds.find_variance_shift(PreActivation(), [normal(400, 4, 8, 8)]))
    assert [shift.path for shift in shifts] == ["norm_b", "norm"]
    assert [len(shift.dropouts) for shift in shifts] == [1, 2]
    for shift in shifts:
        assert shift.predicted is not None
        assert shift.predicted < 0.97
        assert shift.by_dropout == pytest.approx(shift.predicted, abs=0.03)


def test_padding_and_layers_that_are_called_twice() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
            self.last, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.5)
            self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm2(self.conv1(self.drop(self.norm1(x))))
            return self.last(self.conv2(self.drop(x + 3)))

    torch.manual_seed(1)
    shifts = list(ds.find_variance_shift(Small(), [normal(2000, 4, 3, 3)]))
    assert [shift.path for shift in shifts] == ["norm2", "last"]
    for shift in shifts:
        # Without the padding in mind, two taps of three would count too much.
        assert shift.predicted == pytest.approx(shift.by_dropout, rel=0.05)


def test_a_maximum_of_noise_has_no_rule() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.MaxPool2d(2), nn.BatchNorm2d(3))
    (shift,) = ds.find_variance_shift(model, [normal(64, 3, 4, 4)])
    assert shift.predicted is None
    assert shift.by_dropout is not None


def test_what_has_no_rule_is_not_predicted_and_still_measured() -> None:
    class Odd(Direct):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.cumsum(self.drop(self.first(x)), 1))

    torch.manual_seed(0)
    (shift,) = ds.find_variance_shift(Odd(nn.Dropout(0.5)), [normal(5000, 4)])
    assert shift.predicted is None
    assert shift.by_dropout == pytest.approx(0.5, abs=0.05)
    assert "second" in str(ds.find_variance_shift(Odd(nn.Dropout(0.5))))


def test_eval_over_training_is_measured_with_the_running_statistics() -> None:
    torch.manual_seed(0)
    model = Direct(nn.Dropout(0.5))
    model.first.running_var.fill_(4.0)
    (shift,) = ds.find_variance_shift(model, [normal(20_000, 4)])
    assert shift.measured == pytest.approx(0.25 * 0.5, rel=0.05)


def test_nothing_is_changed() -> None:
    model = randomize(Weights()).train()
    model.first.eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    ds.find_variance_shift(model, [normal(8, 3, 4, 4)])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert not model.first.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.last._forward_pre_hooks


def test_table_and_plot(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = ds.find_variance_shift(Direct(nn.Dropout(0.5)), [normal(2000, 4)])
    text = str(found)
    assert "1 BatchNorms behind a dropout" in text
    assert "predicted" in text
    path = found.plot(tmp_path / "shift.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DropsurgeryError, match="cannot be written"):
        found.plot(tmp_path / "nowhere" / "shift.png")
    with pytest.raises(DropsurgeryError, match="nothing to draw"):
        ds.find_variance_shift(nn.Linear(2, 2)).plot(tmp_path / "none.png")


def test_data_that_cannot_be_used() -> None:
    model = Direct(nn.Dropout(0.5))
    with pytest.raises(ArgumentError, match="the data holds no batch"):
        ds.find_variance_shift(model, [])
    with pytest.raises(ArgumentTypeError, match="data is an iterable of batches, got int"):
        ds.find_variance_shift(model, 3)
    with pytest.raises(ArgumentError, match="does not run on the data"):
        ds.find_variance_shift(model, [torch.ones(2, 5)])
    with pytest.raises(ArgumentTypeError, match="got str"):
        ds.find_variance_shift("resnet18")  # type: ignore[arg-type]


# The first remedy


class Net(nn.Module):
    """Dropout in front of BatchNorms, and a head behind the last."""

    def __init__(self, late: float = 0.0) -> None:
        super().__init__()
        self.conv, self.drop, self.norm = nn.Conv2d(3, 4, 3), nn.Dropout(0.3), nn.BatchNorm2d(4)
        self.spatial, self.conv2 = nn.Dropout2d(0.2), nn.Conv2d(4, 4, 3)
        self.norm2, self.path = nn.BatchNorm2d(4), ds.DropPath(0.1)
        self.late, self.head = nn.Dropout(late), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.path(self.drop(self.conv(x)))))
        x = F.relu(self.norm2(self.conv2(self.spatial(x))))
        return self.head(self.late(x.mean((2, 3))))


def test_dropout_moves_behind_the_last_norm() -> None:
    model = randomize(Net()).eval()
    x = normal(5, 3, 8, 8)
    result = ds.apply(model, ds.MoveDropoutAfterLastNorm())
    assert [change.what for change in result.changes] == [
        "removed Dropout p=0.3 'drop', in front of a BatchNorm",
        "removed Dropout2d p=0.2 'spatial', in front of a BatchNorm",
        "inserted Dropout p=0.3 in front of 'head'",
    ]
    assert "drop path belongs to its branch" in result.skipped[0].reason
    net = result.module
    assert torch.equal(net(x), model(x))
    assert list(net.state_dict()) == list(model.state_dict())
    assert "dropout = self.dropout(late)" in net.code
    assert not ds.find_variance_shift(
        ds.apply(net, ds.ConvertDropout("identity", where="path")).module
    )
    assert not net.dropout.training
    back = ds.apply(net, ds.ConvertDropout("original")).module
    assert back.code == ds.trace(model).code
    assert repr(back) == repr(ds.trace(model))


def test_a_late_dropout_is_kept_and_the_rate_can_be_given(tmp_path: Path) -> None:
    result = ds.apply(Net(0.4), ds.MoveDropoutAfterLastNorm(p=0.1))
    assert len(result.changes) == 2
    given = ds.apply(Net(), ds.MoveDropoutAfterLastNorm(p=0.1)).module
    assert given.dropout.p == 0.1
    loaded = ds.load(ds.save(given, tmp_path), Net())
    assert loaded.code == given.code
    with pytest.raises(ArgumentError, match=r"p must lie in \[0, 1\)"):
        ds.MoveDropoutAfterLastNorm(p=1.0)


def test_networks_without_a_place_or_a_need() -> None:
    with pytest.raises(PassError, match="no layer with weights stands behind the last BatchNorm"):
        ds.apply(Direct(nn.Dropout(0.5)), ds.MoveDropoutAfterLastNorm())
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    result = ds.apply(model, ds.MoveDropoutAfterLastNorm())
    assert not result.changes
    assert "no dropout stands in front of a BatchNorm" in result.skipped[0].reason


def test_both_graphs_of_a_network_share_the_new_layer() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return (y, y * 2) if self.training else y

    model = randomize(Two())
    net = ds.apply(model, ds.MoveDropoutAfterLastNorm()).module
    assert net.code.count("self.dropout(") == 2
    assert [p for p, _ in net.named_children()].count("dropout") == 1
    back = ds.apply(net, ds.ConvertDropout("original")).module
    assert back.code == ds.trace(model).code
