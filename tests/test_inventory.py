"""Every source of randomness is found, wherever it hides."""

from __future__ import annotations

import random

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from benchmarks import find_drops as find_drops_benchmark
from dropsurgery.errors import ArgumentTypeError
from dropsurgery.graph.inventory import Drop, drops_of
from tests.test_dropout import Everything


def found(model: nn.Module, **options: object) -> list[tuple[str, str, float | None, str]]:
    drops = ds.find_drops(model, **options)  # type: ignore[arg-type]
    return [(drop.path or drop.kind, drop.form, drop.rate, drop.runs) for drop in drops]


def test_layers_functions_attention_and_what_layers_hold() -> None:
    drops = ds.find_drops(Everything())
    forms = [drop.form for drop in drops]
    assert len(drops) == 15
    assert forms.count("drop path") == 3
    assert forms.count("attention dropout") == 3
    assert {drop.runs for drop in drops} == {"in training"}
    inside = [drop for drop in drops if drop.inside]
    assert {drop.inside for drop in inside} == {"encoder"}
    assert inside[0] == Drop(
        "", "encoder", "encoder.self_attn", "MultiheadAttention", "attention dropout", 0.1,
        "in training", "encoder",
    )  # fmt: skip


def test_the_table_names_layers_and_calls() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout2d(0.25)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x) * torch.rand_like(x)

    text = str(ds.find_drops(Net()))
    assert text.startswith("2 sources of randomness")
    assert "drop                     channel dropout   Dropout2d   0.25   in training" in text
    assert "(root): rand_like        raw draw          rand_like   -      always" in text


def test_raw_draws_in_the_graph_and_their_modes() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.randn_like(x)
            x = F.dropout(x, 0.3) + F.dropout(x, 0.4, training=False)
            x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.2)
            if self.training:
                x = x * x.new_empty(x.shape).bernoulli_(0.9)
            return x

    assert found(Net()) == [
        ("randn_like", "raw draw", None, "always"),
        ("dropout", "dropout", 0.3, "always"),
        ("dropout", "dropout", 0.4, "never"),
        ("scaled_dot_product_attention", "attention dropout", 0.2, "always"),
        ("bernoulli_", "raw draw", None, "in training"),
    ]


def test_raw_draws_in_modules_that_stay_whole() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + torch.rand(3)

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.helped(x) if self.training else x

        def helped(self, x: Tensor) -> Tensor:
            return x[torch.randperm(len(x))]

    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.rand(3)  # drawn once, not in forward

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda module, args, output: noisy(output))
    model = nn.Sequential(Whole(), Quiet(), hooked)
    drops = ds.find_drops(model)
    assert [(drop.path, drop.kind, drop.form, drop.runs) for drop in drops] == [
        ("0", "Whole: torch.randperm", "raw draw", "in training"),
        ("2", "Linear: torch.rand", "raw draw", "always"),
    ]


def test_attention_in_code_draws_where_it_is_given_a_rate() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=None)

    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, None, 0.1)

    model = nn.Sequential(Plain(), Dropping())
    drops = ds.find_drops(ds.trace(model, leaf_modules=(Plain, Dropping)))
    assert [drop.path for drop in drops] == ["1"]


def test_pythons_own_generators_are_fixed_by_tracing() -> None:
    class Skips(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if random.random() < 0.5 else 2 * x

    drops = ds.find_drops(nn.Sequential(Skips()))
    assert [(d.module, d.kind, d.runs) for d in drops] == [
        ("0", "random.random", "fixed by tracing")
    ]


def test_recurrent_layers_activations_and_poolings() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.LSTM(4, 4, dropout=0.0)
            self.two = nn.GRU(4, 4, num_layers=2, dropout=0.5)
            self.act = nn.RReLU()
            self.pool = nn.FractionalMaxPool2d(2, output_size=2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.two(self.one(x)[0])[0])
            return self.pool(F.rrelu(x, training=self.training)[:, None])

    assert found(Net()) == [
        ("two", "recurrent dropout", 0.5, "in training"),
        ("act", "random activation", None, "in training"),
        ("rrelu", "random activation", None, "in training"),
        ("pool", "random pooling", None, "always"),
    ]
    assert ("one", "recurrent dropout", 0.0, "in training") in found(Net(), zero=True)


def test_the_drops_of_timm_and_torchvision() -> None:
    swin = torchvision.models.swin_t(dropout=0.1, attention_dropout=0.2)
    forms = {drop.form for drop in ds.find_drops(swin)}
    assert forms == {"drop path", "function dropout", "dropout"}
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, drop_rate=0.1, patch_drop_rate=0.25
    )
    assert ("patch_drop", "patch dropout", 0.25, "in training") in found(vit)
    resnet = timm.create_model("resnet18", drop_block_rate=0.1)
    assert "drop block" in {drop.form for drop in ds.find_drops(resnet)}
    assert {drop.path for drop in ds.find_drops(
        torchvision.models.googlenet(init_weights=False)
    )} == {"dropout", "aux1.dropout", "aux2.dropout"}  # fmt: skip


def test_the_layers_of_this_library() -> None:
    layers = ds.layers
    model = nn.Sequential(
        layers.Dropout2d(0.1), layers.GaussianDropout(0.2), layers.UniformDropout.matching(0.3),
        layers.ClassicDropout(0.4), layers.MonteCarloDropout(0.5), ds.DropPath(0.6),
        layers.DropBlock2d(0.1), layers.WeightedChannelDropout(0.2), layers.Cutout(2),
    )  # fmt: skip
    assert [(form, rate, runs) for _, form, rate, runs in found(model)] == [
        ("channel dropout", 0.1, "in training"),
        ("gaussian dropout", 0.2, "in training"),
        ("uniform dropout", 0.3, "in training"),
        ("classic dropout", 0.4, "in training"),
        ("monte-carlo dropout", 0.5, "always"),
        ("drop path", 0.6, "in training"),
        ("drop block", 0.1, "in training"),
        ("weighted channel dropout", 0.2, "in training"),
        ("cutout", 1.0, "in training"),
    ]


def test_a_network_without_randomness_and_one_whose_rates_are_zero() -> None:
    assert not ds.find_drops(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))
    assert found(nn.Sequential(nn.Dropout(0.0)), zero=True) == [
        ("0", "dropout", 0.0, "in training")
    ]


def test_nothing_is_changed_or_drawn() -> None:
    model = Everything()
    state = torch.get_rng_state()
    before = repr(model)
    ds.find_drops(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(model) == before
    assert len(list(drops_of(ds.trace(model)))) == 15


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="got str"):
        ds.find_drops("resnet18")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["torchvision:efficientnet_b0", "torchvision:swin_t", "timm:resnet18"]
)
def test_nothing_random_is_left_after_identity_and_all_comes_back(name: str) -> None:
    found = find_drops_benchmark.examine(name, passes=3)
    assert found.ok, found


def test_a_draw_that_is_no_dropout_is_listed_and_the_comparison_sees_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop = nn.Conv2d(3, 3, 1), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(self.conv(x))
            return y + torch.randn_like(y) if self.training else y

    monkeypatch.setattr(
        find_drops_benchmark, "build", lambda name: (Noisy(), torch.ones(2, 3, 4, 4))
    )
    found = find_drops_benchmark.examine("noisy", passes=3)
    assert dict(found.forms) == {"dropout": 1, "raw draw": 1}
    assert found.random_before
    assert not found.identical
