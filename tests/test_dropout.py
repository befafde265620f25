"""Every form of dropout becomes the identity, or Gaussian noise of the same mean and variance."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.errors import ArgumentError
from dropsurgery.layers import (
    GaussianDropout,
    GaussianMultiheadAttention,
    ScaledDotProductAttention,
)

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def convert(model: nn.Module, to: str) -> fx.GraphModule:
    return ds.apply(model, ds.ConvertDropout(to)).module  # type: ignore[arg-type]


# The layers


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_gaussian_dropout_has_the_moments_of_dropout(p: float) -> None:
    torch.manual_seed(0)
    x = torch.full((200_000,), 3.0, dtype=torch.float64)
    for layer in (GaussianDropout(p), nn.Dropout(p)):
        y = layer.train()(x) / 3
        variance = p / (1 - p)
        assert abs(y.mean() - 1) < 4 * math.sqrt(variance / len(x))
        # Standard error of a variance from its fourth moment.
        fourth = (y - 1).pow(4).mean()
        error = torch.sqrt((fourth - variance**2).clamp(min=0) / len(x))
        # At p = 1/2 the Bernoulli mask's error is of second order, hence the floor.
        assert abs(y.var() - variance) < 4 * error + 1e-4
    assert GaussianDropout(p).eval()(x) is x


def test_units_share_a_draw() -> None:
    x = torch.ones(3, 4, 5, 6)
    counts = {
        units: len(GaussianDropout(0.5, units).train()(x).unique())
        for units in ("element", "channel", "row", "batch")
    }
    assert counts == {"element": 360, "channel": 12, "row": 3, "batch": 1}


def test_bad_gaussian_arguments() -> None:
    with pytest.raises(ArgumentError, match="infinite variance at p = 1"):
        GaussianDropout(1.0)
    with pytest.raises(ArgumentError, match=r"p must lie in \[0, 1\]"):
        GaussianDropout(-0.1)
    with pytest.raises(ArgumentError, match="unknown units 'pixel'"):
        GaussianDropout(0.5, "pixel")
    with pytest.raises(ArgumentError, match="infinite variance"):
        ScaledDotProductAttention(1.0, "gaussian")
    with pytest.raises(ArgumentError, match="unknown noise 'uniform'"):
        ScaledDotProductAttention(0.5, "uniform")  # type: ignore[arg-type]
    assert repr(GaussianDropout(0.25)) == "GaussianDropout(p=0.25, units='element')"


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dropsurgery.layers.attention.gaussian_noise", lambda like, p: torch.ones_like(like)
    )


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize(
    ("batch_first", "bias", "own_kdim", "bias_kv", "zero", "batched"),
    list(itertools.product((False, True), repeat=6)),
)
def test_multihead_attention_with_noise_taken_out_is_torchs(
    batch_first: bool, bias: bool, own_kdim: bool, bias_kv: bool, zero: bool, batched: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(
        8, 2, bias=bias, add_bias_kv=bias_kv, add_zero_attn=zero, batch_first=batch_first,
        kdim=6 if own_kdim else None, vdim=4 if own_kdim else None, dtype=torch.float64,
    )  # fmt: skip
    key_dim, value_dim = (6, 4) if own_kdim else (8, 8)
    q, k, v = (torch.randn(2, n, e).double() for n, e in ((3, 8), (5, key_dim), (5, value_dim)))
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 1] = True
    if not batched:
        q, k, v, padding = q[0], k[0], v[0], padding[0]
    elif not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    noisy = copy.deepcopy(layer)
    noisy.__class__ = GaussianMultiheadAttention
    noisy.dropout = 0.5
    causal = torch.ones(3, 5).triu(1).bool()
    per_head = torch.randn((2 if batched else 1) * 2, 3, 5).double()
    for mask, padded, average in itertools.product(
        (None, causal, per_head), (None, padding), (True, False)
    ):
        if padded is not None and mask is per_head:
            padded = torch.zeros_like(padded, dtype=torch.float64).masked_fill(padded, -math.inf)
        expected = layer(q, k, v, padded, True, mask, average)
        actual = noisy(q, k, v, padded, True, mask, average)
        for left, right in zip(expected, actual, strict=True):
            torch.testing.assert_close(left, right)
    assert noisy(q, k, v, need_weights=False)[1] is None


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_with_noise_taken_out_is_torchs(options: dict[str, object], heads: int) -> None:
    q = torch.randn(2, 4, 3, 8).double()
    k, v = (torch.randn(2, heads, 5, 8).double() for _ in range(2))
    layer = ScaledDotProductAttention(0.5, "gaussian").train()
    masks = [None] if "is_causal" in options else [None, torch.ones(3, 5).tril().bool()]
    for mask in masks:
        expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=heads != 4, **options)
        actual = layer(q, k, v, mask, enable_gqa=heads != 4, **options)
        torch.testing.assert_close(actual, expected)


# The pass


class Everything(nn.Module):
    """Each form of dropout once, on a tensor of shape (N, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.drop2d = nn.Dropout2d(0.2)
        self.alpha = nn.AlphaDropout(0.1)
        self.feature_alpha = nn.FeatureAlphaDropout(0.1)
        self.path = timm.layers.DropPath(0.3)
        self.depth = torchvision.ops.StochasticDepth(0.3, "batch")
        self.own = ds.DropPath(0.2)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.4, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop2d(self.drop(self.conv(x)))
        x = x + self.own(self.depth(self.path(F.relu(x))))
        x = self.feature_alpha(self.alpha(x))
        x = F.dropout3d(x.unsqueeze(2), 0.1, self.training).squeeze(2)
        x = F.dropout(x, 0.1, training=self.training)
        x = x.flatten(2).transpose(1, 2)[:, :16]
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)
        x = self.attention(x, x, x)[0]
        return self.encoder(x)


def is_random(module: nn.Module, x: Tensor = X) -> bool:
    module = copy.deepcopy(module).train()
    return not torch.equal(module(x), module(x))


def test_identity_leaves_no_drop_and_no_node() -> None:
    model = Everything().eval()
    assert is_random(model)
    result = ds.apply(model, ds.ConvertDropout("identity"))
    assert not is_random(result.module)
    assert torch.equal(result.module(X), ds.trace(model)(X))
    assert not [n for n in result.module.graph.nodes if "drop" in n.name or "alpha" in n.name]
    assert list(result.module.state_dict()) == list(model.state_dict())
    assert model.attention.dropout == 0.4
    assert model.encoder.dropout1.p == 0.1
    assert len(result.changes) == 15
    kinds = [nn.modules.dropout._DropoutNd, ds.DropPath, timm.layers.DropPath]
    assert not [m for m in result.module.modules() if isinstance(m, tuple(kinds))]


def test_gaussian_is_random_in_training_and_the_identity_in_eval() -> None:
    model = Everything().eval()
    result = ds.apply(model, ds.ConvertDropout("gaussian"))
    assert is_random(result.module)
    assert torch.equal(result.module(X), model(X))
    assert list(result.module.state_dict()) == list(model.state_dict())
    assert type(result.module.attention) is GaussianMultiheadAttention
    assert type(result.module.encoder.self_attn) is GaussianMultiheadAttention
    units = {n: m.units for n, m in result.module.named_modules() if isinstance(m, GaussianDropout)}
    assert (units["drop"], units["drop2d"]) == ("element", "channel")
    assert (units["path"], units["depth"], units["own"]) == ("row", "batch", "row")
    assert not [m for m in result.module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    assert not result.skipped


def test_gaussian_noise_has_the_mean_and_variance_that_dropout_had() -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.3)).double()
    x = torch.full((100_000,), 2.0, dtype=torch.float64)
    torch.manual_seed(0)
    before, after = model.train()(x), convert(model, "gaussian").train()(x)
    assert before.mean().item() == pytest.approx(after.mean().item(), abs=0.03)
    assert before.var().item() == pytest.approx(after.var().item(), rel=0.03)


def test_conversions_compose() -> None:
    model = Everything().eval()
    there_and_out = convert(convert(model, "gaussian"), "identity")
    assert not is_random(there_and_out)
    assert there_and_out.code == convert(model, "identity").code


def test_always_on_dropout_is_converted_when_asked_and_left_by_slim() -> None:
    class AlwaysOn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.dropout(x, 0.5)
            return F.scaled_dot_product_attention(y, y, y, dropout_p=0.5)

    model = AlwaysOn().eval()
    result = ds.apply(model, ds.ConvertDropout("identity"))
    assert "always-on functional dropout p=0.5" in result.changes[0].what
    assert not is_random(result.module)
    left = ds.apply(model, ds.ConvertDropout("gaussian"))
    assert not left.changes
    assert "drops in eval too" in left.skipped[0].reason
    assert is_random(ds.slim(model).eval())


def test_dropout_in_fused_and_foreign_layers() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    model = Sequence()
    x = torch.randn(2, 5, 4)
    assert not is_random(convert(model, "identity"), x)
    assert model.lstm.dropout == 0.5
    result = ds.apply(model, ds.ConvertDropout("gaussian"))
    assert not result.changes
    assert "inside a fused layer" in result.skipped[0].reason


def test_swins_dropout_inside_a_function() -> None:
    model = torchvision.models.swin_t(dropout=0.2, attention_dropout=0.2)
    assert is_random(model)
    converted = convert(model, "identity")
    assert not is_random(converted)
    assert torch.equal(converted.eval()(X), copy.deepcopy(model).eval()(X))


def test_what_has_no_gaussian_form_is_told() -> None:
    model = nn.Sequential(torchvision.ops.DropBlock2d(0.1, 3), nn.Dropout(1.0))
    result = ds.apply(model, ds.ConvertDropout("gaussian"))
    reasons = [skip.reason for skip in result.skipped]
    assert any("drops regions" in reason for reason in reasons)
    assert any("infinite at p = 1" in reason for reason in reasons)
    assert convert(model, "identity").code.count("= ") == 1


def test_in_place_dropout_whose_input_others_read_is_not_made_gaussian() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5, inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            self.drop(x)
            return x

    result = ds.apply(InPlace(), ds.ConvertDropout("gaussian"))
    assert "in place on a tensor that others read" in result.skipped[0].reason
    assert not is_random(convert(InPlace(), "identity"))


@pytest.mark.parametrize(
    "name", ["densenet121", "mobilenet_v2", "efficientnet_b0", "googlenet", "timm:vit"]
)
def test_networks_are_deterministic_in_training_afterwards(name: str) -> None:
    if name == "timm:vit":
        model: nn.Module = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, depth=2, drop_rate=0.1, attn_drop_rate=0.1,
            drop_path_rate=0.1, proj_drop_rate=0.1, pos_drop_rate=0.1,
        )  # fmt: skip
    else:
        options = {"init_weights": False} if name == "googlenet" else {}
        options |= {"drop_rate": 0.2} if name == "densenet121" else {}
        model = torchvision.models.get_model(name, **options)
    net = convert(model, "identity").train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    first, second = net(X), net(X)
    pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
    assert all(torch.equal(left, right) for left, right in pairs)


def test_functional_drops_of_two_graphs_are_layers_that_both_share() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = torch.dropout(self.conv(x), 0.3, self.training)
            x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.2 if self.training else 0.0)
            return (x, x * 2) if self.training else x

    net = ds.trace(Head())
    kinds = [type(m).__name__ for _, m in net.named_children()]
    assert kinds == ["Conv2d", "Dropout", "ScaledDotProductAttention"]
    result = ds.apply(net, ds.ConvertDropout("gaussian"))
    assert len(result.changes) == 4
    assert not result.skipped
    converted = convert(Head(), "identity").train()
    assert all(torch.equal(a, b) for a, b in zip(converted(X), converted(X), strict=True))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_stochastic_depth_as_a_function_is_native(library: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.conv(x))
            if library == "timm":
                y = timm.layers.drop_path(y, 0.3, self.training)
            else:
                y = torchvision.ops.stochastic_depth(y, 0.3, "batch", self.training)
            return x + y

    model = Block()
    net = ds.trace(model)
    assert [type(m) for _, m in net.named_children()] == [nn.Conv2d, ds.DropPath]
    torch.manual_seed(4)
    expected = model.train()(X)
    torch.manual_seed(4)
    assert torch.equal(net.train()(X), expected)
    retrofitted = ds.retrofit(model, 0.5)
    assert [m.drop_prob for m in retrofitted.modules() if isinstance(m, ds.DropPath)] == [0.5]
    assert not is_random(convert(model, "identity"))


def test_projects_own_copies_of_drop_path_are_recognised() -> None:
    class DropPath(nn.Module):
        def __init__(self, drop_prob: float) -> None:
            super().__init__()
            self.drop_prob = drop_prob

        def forward(self, x: Tensor) -> Tensor:
            if self.drop_prob == 0.0 or not self.training:
                return x
            return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.drop_prob)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop_path = nn.Conv2d(3, 3, 1), DropPath(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop_path(F.relu(self.conv(x)))

    net = ds.retrofit(Block(), 0.5)
    assert net.drop_path.drop_prob == 0.5
    assert not [m for m in net.modules() if isinstance(m, ds.DropPath)]
    assert not is_random(convert(Block(), "identity"))


def test_a_subclass_with_a_forward_of_its_own_and_hooks_are_left_alone() -> None:
    class Doubles(timm.layers.DropPath):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hooked = nn.Dropout(0.5)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    model = nn.Sequential(Doubles(0.1), hooked).eval()
    x = torch.ones(2, 2)
    result = ds.apply(model, ds.ConvertDropout("identity"))
    assert torch.equal(result.module(x), model(x))
    assert [skip.reason for skip in result.skipped] == [
        "Dropout p=0.5 '1': its forward hooks would be lost"
    ]


def test_shared_drops_leave_under_all_their_names_and_not_out_of_a_leaf() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.first = nn.Dropout(0.1)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(self.encoder.dropout1(self.second(self.first(x))))

    net = convert(Shares(), "identity")
    assert not hasattr(net, "first")
    assert not hasattr(net, "second")
    assert not is_random(net, torch.ones(2, 3, 4))


def test_bad_target() -> None:
    with pytest.raises(ArgumentError, match="cannot be converted to 'laplace'"):
        ds.ConvertDropout("laplace")  # type: ignore[arg-type]
