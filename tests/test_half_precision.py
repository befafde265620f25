"""Networks that come in half precision: folds that would make them err more are refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

import dropsurgery as ds
from dropsurgery import surgery
from dropsurgery.errors import ArgumentError
from dropsurgery.half_precision import Growth, error_growth
from dropsurgery.surgery import slimmed
from tests.fold_helpers import Chain
from tests.helpers import randomize

HALVES = (torch.float16, torch.bfloat16)


def pooled(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Return a layer whose bias, rounded once, is wrong at each of many positions that are meant.

    The weights are powers of two and keep their values: only the bias is rounded.
    """
    torch.manual_seed(0)
    model = Chain(
        conv=nn.Conv2d(4, 32, 1, bias=False),
        bn=nn.BatchNorm2d(32),
        pool=nn.AdaptiveAvgPool2d(1),
    )
    with torch.no_grad():
        model.conv.weight.copy_(torch.randn(32, 4, 1, 1).sign() / 2)
        model.bn.running_mean.uniform_(-0.2, 0.2)
        model.bn.bias.uniform_(1, 2)
    return model.eval().to(dtype), torch.randn(4, 4, 48, 48).to(dtype)


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, _BatchNorm) for m in module.modules())


def nan(growth: Growth) -> bool:
    return math.isnan(growth.ratio) and not growth.is_worse


@pytest.mark.parametrize("dtype", HALVES)
def test_a_fold_that_errs_more_is_refused_and_says_so(dtype: torch.dtype) -> None:
    model, x = pooled(dtype)
    folded = ds.slim(model, example_inputs=x, half_precision="fold")
    assert norms(folded) == 0
    growth = error_growth(model, folded, x)
    assert growth.is_worse
    assert growth.ratio > 1.2
    result = slimmed(model, example_inputs=x)
    assert norms(result.module) == 1
    assert error_growth(model, result.module, x).ratio == 1.0
    (skip,) = [s for s in result.skipped if s.node == "bn"]
    assert f"errs {growth.ratio:.2f} times as much in {dtype}" in skip.reason
    assert "slim it in float32 and convert" in skip.reason
    assert skip.by == "FoldAffine"
    report = ds.slim_report(model, x)
    assert [s.reason for s in report.left] == [skip.reason]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_fold_that_errs_less_is_done(dtype: torch.dtype) -> None:
    model, x = pooled(dtype)
    model.conv.bias = nn.Parameter(torch.full((32,), 8.0, dtype=dtype))
    model.bn.running_mean += 8.0  # what is rounded beside 8 before it is taken away again
    model.pool = nn.ReLU()
    slim = ds.slim(model, example_inputs=x)
    assert norms(slim) == 0
    assert error_growth(model, slim, x).ratio < 0.5


def test_nothing_is_measured_in_wider_dtypes_and_without_inputs() -> None:
    model, x = pooled(torch.float16)
    assert norms(ds.slim(model)) == 0
    assert norms(ds.slim(model.float(), example_inputs=x.float())) == 0


def test_the_network_and_its_state_stay_as_they_are() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = pooled(torch.float16)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.inner(x)

    model = Counting().train()
    before = copy.deepcopy(model.state_dict())
    x = pooled(torch.float16)[1]
    kept = x.clone()
    state = torch.get_rng_state()
    slim = ds.slim(model, example_inputs=(x,))
    assert norms(slim) == 1
    assert not slim.training
    assert model.training
    assert model.inner.training
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, kept)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_merged_branches_are_refused_where_they_err_more() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 32, 1)
            self.b = nn.Conv2d(4, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) + self.b(x)).mean((2, 3))

    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for conv, low, high in ((model.a, 1.0, 2.0), (model.b, 0.01, 0.02)):
            conv.weight.copy_(torch.randn(32, 4, 1, 1).sign() / 2)
            conv.bias.uniform_(low, high)
    model, x = model.half(), torch.randn(4, 4, 48, 48).half()
    growth = error_growth(model, ds.slim(model, example_inputs=x, half_precision="fold"), x)
    result = slimmed(model, example_inputs=x)
    assert growth.is_worse
    assert [type(m) for m in result.module.modules()].count(nn.Conv2d) == 2
    (skip,) = [s for s in result.skipped if "times as much" in s.reason]
    assert skip.by == "FoldAffine, MergeLinearBranches"


def test_what_cannot_be_told_is_nan() -> None:
    x = torch.randn(2, 4)
    model = nn.Linear(4, 4).half()
    assert nan(error_growth(model, model, torch.zeros(2, 4, device="meta").half()))
    assert nan(error_growth(model, model, x))  # the input is float32
    assert nan(error_growth(model.to("meta"), model, x.half()))
    exact = nn.Identity()
    assert nan(error_growth(exact, exact, x))

    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    assert nan(error_growth(Drawing(), Drawing(), x.half()))


def test_what_overflows_only_after_surgery_is_infinite() -> None:
    class Power(nn.Module):
        def __init__(self, power: int) -> None:
            super().__init__()
            self.power = power

        def forward(self, x: Tensor) -> Tensor:
            return (x * 3.0**self.power) / 3.0**self.power

    x = torch.linspace(1, 2, 50).half()
    assert error_growth(Power(1), Power(10), x) == Growth(math.inf)
    assert nan(error_growth(Power(10), Power(1), x))


def test_inputs_may_be_named() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = pooled(torch.float16)

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.inner(x) * scale

    model, x = Named().eval(), pooled(torch.float16)[1]
    inputs = {"scale": torch.ones(1).half(), "x": x}
    assert norms(ds.slim(model, example_inputs=inputs)) == 1
    assert error_growth(model, ds.slim(model), inputs).is_worse


@pytest.mark.parametrize("kind", [TypeError, AssertionError, KeyError])
def test_whatever_a_forward_raises_slim_goes_on(kind: type[Exception]) -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = pooled(torch.float16)

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise kind("half precision alone")
            return self.inner(x)

    model, x = Strict().eval(), pooled(torch.float16)[1]
    slim = ds.slim(model, example_inputs=x)
    assert norms(slim) == 0
    assert nan(error_growth(model, slim, x))


def test_inputs_without_values_are_not_measured() -> None:
    model, x = pooled(torch.float16)
    assert norms(ds.slim(model, example_inputs=FakeTensorMode().from_tensor(x))) == 0


def test_where_nothing_was_folded_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> Growth:
        raise AssertionError

    monkeypatch.setattr(surgery, "error_growth", fail)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU()).half()
    result = slimmed(model, example_inputs=torch.randn(2, 4).half())
    assert {change.by for change in result.changes} == {"ConvertDropout"}


def test_what_could_not_be_folded_anyway_keeps_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = pooled(torch.float16)
            self.more = nn.BatchNorm2d(4, track_running_stats=False).half()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).sum(1) + self.more(x).sum((1, 2, 3), keepdim=True)[..., 0]

    model, x = Net().eval(), pooled(torch.float16)[1]
    monkeypatch.setattr(surgery, "error_growth", lambda *_: Growth(1.5))
    result = slimmed(model, example_inputs=x)
    told = {skip.node: skip.reason for skip in result.skipped if skip.by == "FoldAffine"}
    assert "errs 1.50 times as much" in told["inner_bn"]
    assert "statistics" in told["more"]
    assert "times as much" not in told["more"]


def test_branches_that_are_not_merged_are_not_folded_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, _ = pooled(torch.float16)
            self.b, _ = pooled(torch.float16)
            self.a.pool = self.b.pool = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    monkeypatch.setattr(surgery, "error_growth", lambda *_: Growth(math.inf))
    model, x = Net().eval(), pooled(torch.float16)[1]
    assert norms(ds.slim(model)) == 0
    result = slimmed(model, example_inputs=x)
    assert norms(result.module) == 2
    left = [skip for skip in result.skipped if "the network overflows in" in skip.reason]
    assert {skip.by for skip in left} == {"FoldAffine, MergeLinearBranches"}


def test_worse_is_beyond_what_chance_does() -> None:
    assert Growth.of([1.1, 1.12, 1.08]).is_worse
    assert not Growth.of([1.9, 0.7, 1.1]).is_worse  # 1.14 on average, and no two alike
    assert not Growth.of([1.01, 1.01, 1.01]).is_worse
    assert not Growth.of([1.5]).is_worse
    assert Growth.of([1.0, math.inf]).is_worse
    assert nan(Growth.of([math.inf, float("nan")]))
    assert not Growth.of([0.5, 0.5]).is_worse


def test_whole_numbers_are_not_varied() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.int64
            return self.out(self.table(x))

    torch.manual_seed(0)
    model = Net().half()
    growth = error_growth(model, copy.deepcopy(model), torch.arange(10))
    assert growth == Growth(1.0, 0.0)


def test_another_choice_is_refused() -> None:
    with pytest.raises(ArgumentError, match="half_precision is 'always'"):
        ds.slim(nn.Linear(2, 2), half_precision="always")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", HALVES)
def test_real_networks_err_no_more(dtype: torch.dtype) -> None:
    import timm

    for name in ("mobilenetv3_small_050", "resnet18"):
        torch.manual_seed(1)
        model = randomize(timm.create_model(name, pretrained=False)).eval().to(dtype)
        x = torch.randn(2, 3, 64, 64).to(dtype)
        slim = ds.slim(model, example_inputs=x)
        assert isinstance(slim, fx.GraphModule)
        assert not error_growth(model, slim, x).is_worse
