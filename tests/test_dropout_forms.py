"""Dropout in its other forms, and back: code, layers, rates and weights are what they were."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError, PassError
from dropsurgery.layers import (
    ClassicDropout,
    GaussianDropout,
    MonteCarloDropout,
    ScaledDotProductAttention,
    UniformDropout,
)
from dropsurgery.passes.base import Plan
from dropsurgery.passes.dropout import ConvertDropout
from tests.test_dropout import Everything, X, convert, is_random


class Plain(nn.Module):
    """Dropout in front of weights that can take its factor."""

    def __init__(self, p: float = 0.25) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.spatial = nn.Dropout2d(p)
        self.second = nn.Conv2d(4, 5, 3)
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(5 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.spatial(self.conv(x))))
        return self.head(self.drop(F.adaptive_avg_pool2d(x, 2)).flatten(1))


FORMS = ("identity", "gaussian", "uniform", "monte-carlo")


def same(left: nn.Module, right: nn.Module, x: Tensor = X) -> None:
    """Hold that two traced networks are one: code, modules, flags, weights, outputs."""
    assert left.code == right.code
    assert repr(left) == repr(right)
    flags = [{p: m.training for p, m in n.named_modules()} for n in (left, right)]
    assert flags[0] == flags[1]
    states = left.state_dict(), right.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, states), strict=True))
    for network in (left, right):
        network.train()
    torch.manual_seed(3)
    first = left(x)
    torch.manual_seed(3)
    assert torch.equal(first, right(x))
    assert torch.equal(left.eval()(x), right.eval()(x))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_taken_back(form: str) -> None:
    model = Everything().eval()
    converted = ds.apply(model, ds.ConvertDropout(form))
    assert len(converted.changes) + len(converted.skipped) == 15
    back = ds.apply(converted.module, ds.ConvertDropout("original"))
    assert len(back.changes) == len(converted.changes)
    same(back.module, ds.trace(model))


def test_forms_on_forms_are_taken_back_in_one_go() -> None:
    model = Everything().eval()
    passes = [ds.ConvertDropout(form) for form in ("gaussian", "uniform", "monte-carlo")]
    result = ds.apply(model, *passes, ds.ConvertDropout("identity"))
    assert not is_random(result.module)
    same(convert(result.module, "original"), ds.trace(model))
    assert not ds.apply(ds.trace(model), ds.ConvertDropout("original")).changes


@pytest.mark.parametrize("form", ["classic", "inverted"])
def test_the_factor_of_classic_dropout_goes_into_the_weights(form: str) -> None:
    torch.manual_seed(0)
    model = Plain().double().eval()
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    classic = ds.apply(model, ds.ConvertDropout("classic"))
    assert "its factor went into the weight of 'head'" in classic.changes[1].what
    kinds = [type(m) for m in classic.module.modules()]
    assert kinds.count(ClassicDropout) == 2
    network = classic.module
    if form == "inverted":
        network = convert(network, "inverted")
        assert [type(m) for m in network.modules()].count(ClassicDropout) == 0
        assert isinstance(network.spatial, nn.Dropout2d)
    torch.testing.assert_close(network.eval()(x), model(x), rtol=1e-13, atol=1e-13)
    same(convert(network, "original"), ds.trace(model), x)
    assert torch.equal(model.head.weight, Plain().double().head.weight) is False
    # In training, too, it is the same function of the masks: its expectation is the same.
    torch.manual_seed(1)
    draws = torch.stack([network.train()(x[:1]) for _ in range(4000)])
    torch.manual_seed(2)
    plain = torch.stack([model.train()(x[:1]) for _ in range(4000)])
    error = (draws.var(0) / 4000 + plain.var(0) / 4000).sqrt()
    assert ((draws.mean(0) - plain.mean(0)).abs() < 4 * error).all()


def test_classic_dropout_taken_out_leaves_its_factor_in_the_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 4), ClassicDropout(0.5), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3)
    network = convert(model, "identity")
    assert "ClassicDropout" not in repr(network)
    torch.testing.assert_close(network(x), model(x))
    assert torch.equal(getattr(network, "2").weight, model[2].weight * 0.5)
    same(convert(network, "original"), ds.trace(model), x)


def test_a_weight_that_was_trained_since_gives_the_factor_back() -> None:
    model = Plain().eval()
    network = convert(model, "classic")
    with torch.no_grad():
        network.head.weight.add_(1.0)
    expected = network.head.weight.detach() * 0.75
    back = convert(network, "original")
    torch.testing.assert_close(back.head.weight.detach(), expected)
    assert back.second.weight is model.second.weight


@pytest.mark.parametrize("case", ["output", "sigmoid", "shared", "skip"])
def test_a_factor_that_nothing_can_take_keeps_the_form(case: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.linear = nn.Dropout(0.5), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(x)
            if case == "output":
                return y
            if case == "sigmoid":
                return self.linear(y.sigmoid())
            if case == "shared":
                return self.linear(self.linear(y))
            return self.linear(y) + y

    result = ds.apply(Net(), ds.ConvertDropout("classic"))
    assert not result.changes
    reason = {"shared": "is shared"}.get(case, "sees its eval factor")
    assert reason in result.skipped[0].reason


@pytest.mark.parametrize("mode", ["row", "subset", "batch"])
@pytest.mark.parametrize("form", ["gaussian", "uniform", "monte-carlo"])
def test_inserted_drop_path_of_every_mode(mode: str, form: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.relu(self.conv(x))

    net = ds.retrofit(Block(), 0.5, mode=mode)  # type: ignore[arg-type]
    converted = convert(net, form)
    units = [getattr(m, "units", None) for m in converted.modules()]
    assert ("batch" if mode == "batch" else "row") in units
    # One draw for a mini-batch is the same twice in a row half of the time.
    assert any(is_random(converted) for _ in range(30))
    assert convert(converted, "original").code == net.code


def test_uniform_noise_matches_the_variance_or_has_the_beta_given() -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.3)).double()
    x = torch.full((100_000,), 2.0, dtype=torch.float64)
    torch.manual_seed(0)
    after = convert(model, "uniform").train()(x)
    assert after.var().item() == pytest.approx(4 * 0.3 / 0.7, rel=0.02)
    narrow = ds.apply(model, ds.ConvertDropout("uniform", beta=0.1)).module.train()(x)
    assert 1.8 < narrow.min() < 1.81
    assert 2.19 < narrow.max() < 2.2


def test_noise_becomes_the_dropout_of_the_same_variance() -> None:
    model = nn.Sequential(
        GaussianDropout(0.3), UniformDropout.matching(0.2, "row"), MonteCarloDropout(0.1)
    )
    network = convert(model, "inverted")
    assert repr(network).splitlines()[1:4] == [
        "  (0): Dropout(p=0.3, inplace=False)",
        "  (1): DropPath(drop_prob=0.2, mode='row')",
        "  (2): Dropout(p=0.1, inplace=False)",
    ]
    result = ds.apply(nn.Sequential(GaussianDropout(0.3, "channel")), ds.ConvertDropout("inverted"))
    assert "rank of its input is not known" in result.skipped[0].reason
    assert not ds.apply(Plain(), ds.ConvertDropout("inverted")).changes


# Where


def test_where_chooses_by_path_module_node_and_callable() -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, drop_rate=0.1, proj_drop_rate=0.1,
        drop_path_rate=0.2,
    )  # fmt: skip
    chosen = ds.apply(vit, ds.ConvertDropout("gaussian", where="blocks.1.*"))
    assert {change.module.partition(".mlp")[0] for change in chosen.changes} == {
        "blocks.1", "blocks.1.attn",
    }  # fmt: skip
    assert any("not chosen by where='blocks.1.*'" in skip.reason for skip in chosen.skipped)
    paths = ds.ConvertDropout("gaussian", where=lambda drop: drop.form == "drop path")
    result = ds.apply(vit, paths)
    assert len(result.changes) == 4  # the first block has an identity
    assert len(ds.apply(vit, ds.ConvertDropout("identity", where=("head_drop",))).changes) == 1
    partly = ds.apply(result.module, ds.ConvertDropout("original", where="blocks.2.*"))
    assert len(partly.changes) == 2
    kinds = [type(m).__name__ for m in partly.module.modules()]
    assert kinds.count("GaussianDropout") == 2


def test_where_that_matches_nothing_and_bad_arguments() -> None:
    with pytest.raises(PassError, match="where='layer9' matches none of the 2 drops"):
        ds.apply(Plain(), ds.ConvertDropout("identity", where="layer9"))
    with pytest.raises(PassError, match="matches none of the 0 drops"):
        ds.apply(Plain(), ds.ConvertDropout("original", where="drop"))
    with pytest.raises(ArgumentTypeError, match="where chooses drops by a pattern"):
        ds.ConvertDropout("identity", where=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="beta goes with 'uniform'"):
        ds.ConvertDropout("gaussian", beta=0.1)
    with pytest.raises(ArgumentError, match="beta must be 0 or more"):
        ds.ConvertDropout("uniform", beta=-1.0)
    with pytest.raises(ArgumentError, match="unknown noise 'laplace'"):
        ds.ConvertDropout("monte-carlo", noise="laplace")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="noise='input' goes with 'monte-carlo'"):
        ds.ConvertDropout("gaussian", noise="input")


# What travels


@pytest.mark.parametrize("form", ["identity", "uniform"])
def test_a_copy_and_a_pickle_can_be_taken_back(form: str) -> None:
    model = Everything().eval()
    network = convert(model, form)
    back = convert(copy.deepcopy(network), "original")
    same(back, ds.trace(copy.deepcopy(ds.trace(model))))


def test_a_pickle_can_be_taken_back() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, drop_rate=0.1).eval()
    network = pickle.loads(pickle.dumps(convert(vit, "identity")))
    back = ds.apply(network, ds.ConvertDropout("original"))
    assert "took back: removed Dropout p=0.1 'head_drop'" in {c.what for c in back.changes}
    assert not back.skipped
    torch.manual_seed(3)
    first = back.module.train()(X)
    torch.manual_seed(3)
    assert torch.equal(first, vit.train()(X))


@pytest.mark.parametrize("form", ["identity", "classic", "monte-carlo"])
def test_a_conversion_is_saved_and_loaded(form: str, tmp_path: Path) -> None:
    model = Plain().eval()
    network = ds.apply(model, ds.ConvertDropout(form, where=lambda drop: "drop" in drop.path))
    loaded = ds.load(ds.save(network.module, tmp_path / "a"), Plain())
    assert loaded.code == network.module.code
    assert repr(loaded) == repr(network.module)
    back = convert(loaded, "original")
    again = ds.load(ds.save(back, tmp_path / "b"), Plain())
    assert again.code == ds.trace(model).code
    assert repr(again) == repr(ds.trace(model))
    x = torch.randn(2, 3, 12, 12)
    # Weights that were loaded since are divided by their factor, and rounded once more.
    torch.testing.assert_close(again(x), model(x))


def test_parameters_survive_json() -> None:
    item = ds.ConvertDropout("uniform", where=("a", "b.*"), beta=0.2, always_on=False)
    data = item.to_json(Plan())
    assert data.pop("pass") == "ConvertDropout"
    data["where"] = list(data["where"])
    assert ConvertDropout.from_json(data) == item
    # What earlier versions wrote.
    assert ConvertDropout.from_json({"to": "gaussian", "always_on": True}).where is None


def test_a_callable_that_changed_nothing_is_saved_and_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    item = ds.ConvertDropout("classic", where=lambda drop: drop.rate == 0.5)
    net = ds.apply(model, item).module
    assert ds.load(ds.save(net, tmp_path), model).code == net.code


def test_other_surgery_in_between() -> None:
    model = torchvision.models.resnet18().eval()
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    network = ds.retrofit(convert(model, "identity"), 0.5)
    back = ds.apply(network, ds.ConvertDropout("original"))
    assert len(back.changes) == 1
    assert isinstance(back.module.get_submodule("fc.0"), nn.Dropout)
    gone = ds.slim(convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.BatchNorm2d(4))
                           .eval(), "identity"))  # fmt: skip
    result = ds.apply(gone, ds.ConvertDropout("original"))
    assert "the graph around it has changed since" in result.skipped[0].reason


def test_raw_draws_are_told_and_left() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.rrelu(x * torch.rand_like(x), training=True)

    result = ds.apply(Net(), ds.ConvertDropout("identity"))
    assert not result.changes
    assert [skip.reason.partition(":")[0] for skip in result.skipped] == [
        "raw draw rand_like", "always-on functional rrelu",
    ]  # fmt: skip


def test_layers_that_calls_share_are_converted_and_restored_once() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.again = self.drop
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.linear(self.drop(x))) + self.again(x)

    x = torch.randn(2, 4)
    for form in FORMS:
        network = convert(Shares().eval(), form)
        if form != "identity":
            assert network.drop is network.again
        back = convert(network, "original")
        assert back.drop is back.again
        assert isinstance(back.drop, nn.Dropout)
        assert not is_random(convert(back, "identity"), x)


@pytest.mark.parametrize("form", ["identity", "gaussian"])
def test_a_block_at_two_paths_is_converted_and_restored_under_both(form: str) -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = block, block

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    before = ds.trace(Twice())
    there = ds.apply(Twice(), ConvertDropout(form)).module
    assert not any(isinstance(layer, nn.Dropout) for layer in there.modules())
    back = ds.apply(there, ConvertDropout("original")).module
    names = [name for name, _ in before.named_modules(remove_duplicate=False)]
    assert [name for name, _ in back.named_modules(remove_duplicate=False)] == names
    assert back.code == before.code


def test_two_graphs_are_converted_and_restored() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.drop = nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.drop(self.conv(x))
            x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.2 if self.training else 0.0)
            return (x, self.drop(x)) if self.training else x

    traced = ds.trace(Head())
    for form in FORMS:
        back = convert(convert(traced, form), "original")
        assert back.code == traced.code
        assert repr(back) == repr(traced)
    assert isinstance(
        convert(traced, "gaussian").scaled_dot_product_attention, ScaledDotProductAttention
    )
