"""Attentive CutMix: the cells that the network attends to, pasted in their place."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery.errors import ArgumentError, ArgumentTypeError, PassError
from dropsurgery.layers import AttentiveCutMix
from tests.drop_helpers import seeded
from tests.helpers import randomize


class Brightness(nn.Module):
    """Attends to what is bright: the image itself, as a feature map."""

    def __init__(self, pooled: int = 1) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


def images(count: int = 6, edge: int = 28) -> Tensor:
    return torch.rand(count, 3, edge, edge, generator=seeded(1))


def by_hand(x: Tensor, source: Tensor, cells: int, grid: tuple[int, int]) -> Tensor:
    """Mix cell by cell, in Python."""
    mixed = x.clone()
    rows = [x.shape[2] * i // grid[0] for i in range(grid[0] + 1)]
    columns = [x.shape[3] * i // grid[1] for i in range(grid[1] + 1)]
    boxes = [
        (slice(rows[i], rows[i + 1]), slice(columns[j], columns[j + 1]))
        for i in range(grid[0])
        for j in range(grid[1])
    ]
    for image, other in enumerate(source.tolist()):
        best = sorted(boxes, key=lambda box: -float(x[other][(slice(None), *box)].mean()))
        for box in best[:cells]:
            mixed[image][(slice(None), *box)] = x[other][(slice(None), *box)]
    return mixed


@pytest.mark.parametrize(
    ("cells", "grid", "edge"), [(6, (7, 7), 28), (1, (4, 2), 28), (8, (4, 2), 28), (5, (3, 3), 27)]
)
def test_the_brightest_cells_are_pasted(cells: int, grid: tuple[int, int], edge: int) -> None:
    x = images(edge=edge)
    mix = AttentiveCutMix(Brightness(), cells, grid, generator=seeded(2))
    mixed = mix(x, torch.arange(6), num_classes=6)
    assert sorted(mixed.source.tolist()) == list(range(6))
    assert torch.equal(mixed.images, by_hand(x, mixed.source, cells, grid))
    assert torch.allclose(mixed.lam, torch.full((6,), cells / (grid[0] * grid[1])))
    hot = torch.eye(6)
    share = mixed.lam[:, None]
    torch.testing.assert_close(mixed.labels, share * hot[mixed.source] + (1 - share) * hot)
    assert torch.equal(mixed.images != x, (mixed.images != x) & mixed.mask)


def test_the_share_is_that_of_the_pixels() -> None:
    # 10 pixels in 3 cells: 3, 3 and 4 of them.
    mixed = AttentiveCutMix(Brightness(), 2, 3, generator=seeded(3))(images(edge=10))
    assert mixed.labels is None
    assert torch.equal(mixed.lam, mixed.mask.flatten(1).float().mean(1))
    assert {round(float(share) * 100) for share in mixed.lam} <= {18, 21, 24, 25, 28}


def test_soft_labels() -> None:
    labels = torch.rand(6, 4, generator=seeded(4), dtype=torch.float64).softmax(1)
    mixed = AttentiveCutMix(Brightness(), generator=seeded(4))(images(), labels)
    assert mixed.labels is not None
    assert mixed.labels.dtype == torch.float64
    torch.testing.assert_close(mixed.labels.sum(1), torch.ones(6, dtype=torch.float64))


def test_seeds_and_modes() -> None:
    x = images()
    mix = AttentiveCutMix(nn.Sequential(Brightness(), nn.Dropout(0.5)), generator=seeded(5))
    first, second = mix(x), mix(x)
    assert not torch.equal(first.source, second.source)
    mix.generator.manual_seed(5)  # type: ignore[union-attr]
    assert torch.equal(mix(x).images, first.images)
    # The network that looks never trains, and takes no gradients.
    assert mix.training
    assert not any(module.training for module in mix.attention.modules())
    mix.train()
    assert not mix.attention.training
    plain = mix.eval()(x, torch.zeros(6, dtype=torch.int64), 2)
    assert plain.images is x
    assert torch.equal(plain.lam, torch.zeros(6))
    assert torch.equal(plain.labels, torch.tensor([[1.0, 0.0]]).expand(6, 2))


def test_gradients_reach_the_images_only() -> None:
    layer = nn.Conv2d(3, 2, 1)
    x = images().requires_grad_()
    AttentiveCutMix(layer)(x).images.sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize(
    "tap", ["layer3", "layer4", "layer4.0.conv1", "avgpool", "layer2_1_relu_1"]
)
def test_any_layer_of_a_network(tap: str) -> None:
    model = randomize(torchvision.models.resnet18()).train()
    attention = ds.tap(model, tap)
    assert not any(module.training for module in attention.modules())
    assert all(module.training for module in model.modules())
    mixed = AttentiveCutMix(attention, 3, 4, generator=seeded(6))(images(3, 64))
    assert torch.allclose(mixed.lam, torch.full((3,), 3 / 16))


def test_the_tapped_value_is_the_layers() -> None:
    model = randomize(torchvision.models.resnet18()).eval()
    x = images(2, 64)
    seen = []
    model.layer3.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = model(x) is not None and seen[0]
    model.layer3._forward_hooks.clear()
    attention = ds.tap(model, "layer3")
    assert torch.equal(attention(x), expected)
    assert not any(path.startswith(("layer4", "fc")) for path, _ in attention.named_modules())


class Overwritten(nn.Module):
    """A layer whose output is overwritten in place behind it, and a call before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x.mul(2.0).add_(1.0)))


def test_what_comes_behind_does_not_overwrite_the_tap() -> None:
    model = Overwritten()
    x = images(2)
    assert torch.equal(ds.tap(model, "conv")(x), model.conv(2 * x + 1))
    assert "relu" not in ds.tap(model, "conv").code


def test_tokens_of_a_vision_transformer() -> None:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16
    )
    attention = ds.tap(model, "encoder.layers.encoder_layer_1")
    x = images(2, 32)
    assert attention(x).shape == (2, 17, 8)  # a class token and 4 x 4 others
    mixed = AttentiveCutMix(attention, 3, 4, generator=seeded(7))(x)
    assert torch.allclose(mixed.lam, torch.full((2,), 3 / 16))


def test_layouts() -> None:
    x = images()

    class Back(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2)

    results = [
        AttentiveCutMix(module, layout=layout, generator=seeded(8))(x).images
        for module, layout in ((Brightness(), None), (Back(), "NHWC"), (Tokens(), None))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_two_graphs_and_leftovers_of_training() -> None:
    model = torchvision.models.googlenet(init_weights=False)
    x = images(2, 64)
    assert ds.tap(model, "inception4c")(x).shape[1] == 512


@pytest.mark.parametrize("at", ["layer5", "layer4.7", "leyer4"])
def test_a_tap_that_does_not_exist(at: str) -> None:
    model = torchvision.models.resnet18()
    with pytest.raises(PassError, match=rf"has no module and no node '{at}' to tap") as error:
        ds.tap(model, at)
    assert "near it: " in str(error.value)
    assert "layer4" in str(error.value)


def test_a_tap_with_several_outputs() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x * 3

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.pair(x)
            return left + right

    with pytest.raises(PassError, match=r"'pair' has 2 outputs") as error:
        ds.tap(Holds(), "pair")
    assert "where: mul, mul_1" in str(error.value)
    assert ds.tap(Holds(), "mul_1")(torch.ones(1)) == 3.0
    with pytest.raises(ArgumentTypeError, match=r"at is a module path or a node's name, got 3"):
        ds.tap(Holds(), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"cells": 0}, ArgumentError, "cells must lie in 1 … 49"),
        ({"cells": 50}, ArgumentError, "cells must lie in 1 … 49"),
        ({"grid": 0}, ArgumentError, "grid is a number of cells"),
        ({"grid": (7, 7, 7)}, ArgumentError, "grid is a number of cells"),
        ({"layout": "CHW"}, ArgumentError, "unknown layout 'CHW'"),
        ({"generator": 3}, ArgumentTypeError, "generator must be a torch.Generator"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        AttentiveCutMix(Brightness(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"attention is a module that returns"):
        AttentiveCutMix("layer4")  # type: ignore[arg-type]


def test_bad_inputs() -> None:
    mix = AttentiveCutMix(Brightness())
    with pytest.raises(ArgumentError, match=r"AttentiveCutMix needs a tensor of rank 4"):
        mix(torch.ones(3, 28, 28))
    with pytest.raises(ArgumentError, match=r"a grid of \(7, 7\) cells does not fit"):
        mix(images(edge=5))
    with pytest.raises(ArgumentError, match=r"labels are \(N,\) integers with num_classes"):
        mix(images(), torch.arange(6))
    with pytest.raises(ArgumentError, match=r"returned shape \(6, 3\), where a feature map"):
        AttentiveCutMix(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))(images())
    with pytest.raises(ArgumentError, match=r"784 tokens|7 tokens are no square map"):
        AttentiveCutMix(nn.Sequential(nn.Flatten(2), nn.Linear(784, 2)), layout="NLC")(
            images(edge=28)[:, [0, 1, 2, 0, 1, 2, 0]]
        )
