"""Insertion of DropBlock, DropConnect, Weighted Channel Dropout and Cutout, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError, PassError
from dropsurgery.graph.drops import is_drop
from tests.drop_helpers import LAYERS, assert_mean, assert_variance, seeded
from tests.test_insert_dropout import check_reverts


def inserted(module: nn.Module) -> dict[str, nn.Module]:
    """Return the drop layers by path."""
    return {path: layer for path, layer in module.named_modules() if is_drop(layer)}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_a_network_holds_itself(name: str) -> None:
    build, shape = LAYERS[name]
    model = nn.Sequential(nn.Tanh(), build(0.4)).eval()
    traced = ds.trace(model)
    x = torch.rand(shape)
    assert torch.equal(traced(x), model(x))
    torch.manual_seed(0)
    expected = model.train()(x)
    torch.manual_seed(0)
    assert torch.equal(traced.train()(x), expected)
    slim = ds.slim(model)
    assert len(list(slim.children())) == (2 if name == "ClassicDropout" else 1)
    torch.testing.assert_close(slim(x), model.eval()(x))


# DropBlock


def test_drop_block_goes_behind_activations_over_maps() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
        nn.ReLU(),
    )  # fmt: skip
    result = ds.apply(model, ds.InsertDropBlock(0.2, 3, per_channel=False))
    ((path, layer),) = inserted(result.module).items()
    assert (path, layer.p, layer.block_size, layer.per_channel) == (
        "drop_block", 0.2, (3, 3), False,
    )  # fmt: skip
    (skip,) = result.skipped
    assert skip.reason == ("it is no feature map: it is of rank 2, where rank 4 or 5 is needed")


def test_drop_block_over_volumes() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU())
    module = ds.apply(model, ds.InsertDropBlock(0.2, 2)).module.train()
    assert type(inserted(module)["drop_block"]) is ds.layers.DropBlock3d
    assert module(torch.rand(2, 1, 6, 6, 6)).shape == (2, 2, 4, 4, 4)


def test_drop_block_where_nothing_is_spatial() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU())
    with pytest.raises(PassError, match=r"InsertDropBlock can use none of the 1 places") as error:
        ds.apply(model, ds.InsertDropBlock(0.1), example_inputs=torch.ones(2, 3, 2, 2))
    assert "it is no feature map: it is of rank 2" in str(error.value)
    assert "fix: " in str(error.value)


def test_drop_block_leaves_gates_alone_where_shapes_tell() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Sigmoid()
    )
    result = ds.apply(model, ds.InsertDropBlock(0.1), example_inputs=torch.ones(2, 3, 8, 8))
    assert [change.node for change in result.changes] == ["_1"]
    assert [skip.reason for skip in result.skipped] == ["it is no feature map but a single pixel"]


@pytest.mark.parametrize("block_size", [0, -1, 2.5, True, (3, 3)])
def test_a_block_of_no_size(block_size: object) -> None:
    with pytest.raises(ArgumentError, match=r"block_size must be an int of 1 or more"):
        ds.InsertDropBlock(0.1, block_size)  # type: ignore[arg-type]


# Weighted Channel Dropout


def test_channels_are_weighted_behind_what_is_not_negative() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3)
    )
    result = ds.apply(model, ds.InsertWeightedChannelDropout(0.5, 0.1))
    ((_, layer),) = inserted(result.module).items()
    assert (layer.p, layer.random_p) == (0.5, 0.1)
    assert [change.node for change in result.changes] == ["_1"]
    assert "can be negative" in result.skipped[0].reason
    signed = ds.InsertWeightedChannelDropout(0.5, signed=True)
    assert len(ds.apply(model, signed).changes) == 2
    with pytest.raises(ArgumentError, match=r"random_p must lie in \[0, 1\)"):
        ds.InsertWeightedChannelDropout(0.5, 1.0)


# DropConnect

CONVS = [
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 1), padding=(1, 0), padding_mode="reflect"), (2, 4, 9, 8)),
    (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9)),
    (nn.Conv3d(4, 6, 2, padding=1, padding_mode="replicate"), (2, 4, 5, 4, 3)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), (2, 4, 9, 8)),
    (nn.ConvTranspose3d(4, 6, 2, padding=1), (2, 4, 5, 4, 3)),
    (nn.Linear(4, 6), (2, 4)),
    (nn.Linear(4, 6, bias=False), (2, 3, 4)),
]


class Holds(nn.Module):
    """A layer, called with its input as a keyword or not."""

    def __init__(self, layer: nn.Module, keyword: bool = False) -> None:
        super().__init__()
        self.layer, self.keyword = layer, keyword

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(input=x) if self.keyword else self.layer(x))


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize(("layer", "shape"), CONVS, ids=lambda value: str(value)[:40])
def test_the_layers_own_arithmetic_with_a_dropped_weight(
    layer: nn.Module, shape: tuple[int, ...], keyword: bool
) -> None:
    model = Holds(layer, keyword).eval()
    x = torch.randn(shape, generator=seeded(1))
    check_reverts(model, ds.InsertDropConnect(0.4), x=x)
    module = ds.apply(model, ds.InsertDropConnect(0.4)).module.train()
    torch.manual_seed(2)
    y = module(x)
    torch.manual_seed(2)
    dropped = ds.layers.DropConnect(0.4)(layer.weight)
    assert bool((dropped == 0).any())
    expected = torch.func.functional_call(model, {"layer.weight": dropped}, x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert layer.weight.grad is not None
    layer.zero_grad()


def test_masks_for_each_sample() -> None:
    layer = nn.Linear(3, 1).double()
    model = nn.Sequential(layer)
    insertion = ds.InsertDropConnect(0.3, per_sample=True)
    module = ds.apply(model, insertion).module.train()
    x = torch.randn(1, 3, generator=seeded(3), dtype=torch.float64)
    torch.manual_seed(4)
    y = module(x.expand(20_000, 3))[:, 0]
    assert_mean(y, float(layer(x).detach()))
    assert_variance(y, float((layer.weight * x).detach().square().sum() * 0.3 / 0.7))
    check_reverts(model.eval(), insertion, x=x)
    check_reverts(model.eval(), insertion, x=torch.randn(2, 4, 3, dtype=torch.float64))


class Odd(nn.Module):
    """Layers that cannot be opened, each for a reason, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.hooked = nn.Linear(4, 4)
        self.hooked.register_forward_hook(lambda module, args, output: output)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.tied = nn.Linear(4, 4)
        self.own = Doubles(4, 4)
        self.conv = nn.Conv1d(1, 1, 1)
        self.plain = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.tied(self.normed(self.hooked(x))))
        x = self.conv(x.unsqueeze(1)).squeeze(1)
        return self.plain(x) @ self.tied.weight


class Doubles(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layers_that_cannot_be_opened() -> None:
    model = Odd().eval()
    traced = ds.trace(model, leaf_modules=[Doubles])
    result = ds.apply(traced, ds.InsertDropConnect(0.3, per_sample=True))
    assert [change.node for change in result.changes] == ["plain"]
    reasons = {skip.module: skip.reason for skip in result.skipped}
    assert reasons == {
        "hooked": "its forward hooks would be lost",
        "normed": "its weight is computed by a parametrization",
        "tied": "its parameters are read by something else too",
        "own": "Doubles has a forward of its own",
        "conv": "masks for each sample are for linear layers only",
    }
    x = torch.randn(2, 4)
    assert torch.equal(result.module(x), model(x))


def test_drop_connect_has_no_before() -> None:
    for arguments in ({"before": "Linear"}, {"after": "Linear"}):
        with pytest.raises(ArgumentError, match=r"InsertDropConnect drops weights, neither"):
            ds.InsertDropConnect(0.3, **arguments)
    with pytest.raises(ArgumentTypeError, match=r"of names kinds of layers, got 3"):
        ds.InsertDropConnect(0.3, of=3)  # type: ignore[arg-type]


def test_drop_connect_becomes_gaussian_noise_on_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    module = ds.apply(model, ds.InsertDropConnect(0.3), ds.ConvertDropout("gaussian")).module
    x = torch.randn(4, 3)
    assert torch.equal(module(x), model(x))
    assert [type(layer) for layer in inserted(module).values()] == [ds.layers.GaussianDropout]
    assert not torch.equal(module.train()(x), model(x))


# Cutout


class Normalises(nn.Module):
    """Two inputs, one of which is an image; it is normalised before the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(5, 4)

    def forward(self, meta: Tensor, image: Tensor) -> Tensor:
        return self.conv((image - 0.5) / 0.2).mean((2, 3)) + self.fc(meta)


def test_cutout_finds_the_image() -> None:
    model = Normalises().eval()
    result = ds.apply(model, ds.InsertCutout(3))
    (change,) = result.changes
    assert change.what.startswith("inserted 'cutout' at the input 'image': Cutout(size=3")
    inputs = torch.randn(2, 5), torch.rand(2, 3, 8, 8)
    assert torch.equal(result.module(*inputs), model(*inputs))
    assert not torch.equal(result.module.train()(*inputs), model(*inputs))
    assert ds.apply(result.module, ds.RemoveDrops()).module.code == ds.trace(model).code


class Adds(nn.Module):
    """Two inputs that nothing tells apart."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left * 2 + right


def test_cutout_needs_one_image() -> None:
    with pytest.raises(PassError, match=r"needs one image input, and no input of the network"):
        ds.apply(Adds(), ds.InsertCutout(3))
    images = (torch.ones(2, 3, 4, 4),) * 2
    with pytest.raises(PassError, match=r"needs one image input, and 2 inputs of the network"):
        ds.apply(Adds(), ds.InsertCutout(3), example_inputs=images)
    with pytest.raises(PassError, match=r"no input of the network is named 'middle'") as error:
        ds.apply(Adds(), ds.InsertCutout(3, input="middle"))
    assert "inputs: left, right" in str(error.value)
    module = ds.apply(Adds(), ds.InsertCutout(3, input="right")).module.train()
    y = module(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4))
    assert set(y.unique().tolist()) == {2.0, 3.0}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"size": 0}, "size must be 1 or more"),
        ({"p": 1.5}, r"p must lie in \[0, 1\]"),
        ({"input": 3}, "input is the name of an input, got 3"),
    ],
)
def test_a_cutout_that_cannot_be(arguments: dict[str, object], match: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=match):
        ds.InsertCutout(**arguments)  # type: ignore[arg-type]
