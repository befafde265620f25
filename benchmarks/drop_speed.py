"""A training step of each drop layer against the fastest public implementation of the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.models import import_timm, import_torchvision

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Race:
    """One comparison.

    Attributes:
        ours: the layer's name.
        shape: shape of its input.
        layer: what is timed.
        peers: the public implementations, by name; the fastest counts.
        note: what there is to say of the comparison.
        is_input: whether the input is data, which takes no gradient: forward alone is timed.
    """

    ours: str
    shape: tuple[int, ...]
    layer: Step
    peers: dict[str, Step]
    note: str = ""
    is_input: bool = False


MAPS = (32, 256, 14, 14)
NO_PEER = "no public one; against torch's dropout of the same units"
ON_WEIGHT = "no public one; against torch's dropout on the weight"


def weighted_by_hand(x: Tensor) -> Tensor:
    """Return Weighted Channel Dropout at p = 0.3 as its steps read."""
    with torch.no_grad():
        scores = x.mean((2, 3)).clamp_min(1e-6)
        keys = torch.rand_like(scores) ** (1.0 / scores)
        kept = keys.topk(round(0.7 * x.shape[1]), 1).indices
        mask = torch.zeros_like(scores).scatter(1, kept, 1.0)
        factor = mask * scores.sum(1, keepdim=True) / (scores * mask).sum(1, keepdim=True)
    return x * factor[..., None, None]


def dropouts() -> list[Race]:
    """Return the comparisons of layers that drop elements, channels and samples."""
    torchvision, timm, layers = import_torchvision(), import_timm(), ds.layers
    volumes, torch_dropout = (8, 64, 8, 28, 28), {"torch": nn.Dropout(0.3)}
    paths = {
        "timm": timm.layers.DropPath(0.3),
        "torchvision": torchvision.ops.StochasticDepth(0.3, "row"),
    }
    return [
        Race("Dropout", MAPS, layers.Dropout(0.3), torch_dropout),
        Race("Dropout1d", (64, 512, 128), layers.Dropout1d(0.3), {"torch": nn.Dropout1d(0.3)}),
        Race("Dropout2d", MAPS, layers.Dropout2d(0.3), {"torch": nn.Dropout2d(0.3)}),
        Race("Dropout3d", volumes, layers.Dropout3d(0.3), {"torch": nn.Dropout3d(0.3)}),
        Race("ClassicDropout", MAPS, layers.ClassicDropout(0.3), torch_dropout, NO_PEER),
        Race("GaussianDropout", MAPS, layers.GaussianDropout(0.3), torch_dropout, NO_PEER),
        Race("UniformDropout", MAPS, layers.UniformDropout(0.1), torch_dropout, NO_PEER),
        Race("DropPath", MAPS, layers.DropPath(0.3), paths),
        Race(
            "WeightedChannelDropout",
            MAPS,
            layers.WeightedChannelDropout(0.3),
            {"torch": weighted_by_hand},
            "no public one; against its steps written out in torch, with topk; the layer sorts, so "
            "that compiled code takes another rate without compiling again",
        ),
    ]


def blocks() -> list[Race]:
    """Return the comparisons of layers that drop regions."""
    torchvision, timm, layers = import_torchvision(), import_timm(), ds.layers
    from torchvision.transforms import v2

    alone = {
        "torchvision": torchvision.ops.DropBlock2d(0.1, 7),
        "timm": timm.layers.DropBlock2d(0.1, 7, couple_channels=False),
    }
    volumes = {"torchvision": torchvision.ops.DropBlock3d(0.1, 3)}
    erasing = timm.data.random_erasing.RandomErasing(1.0, 0.08, 0.082, 1.0, 1.0, device="cpu")
    erasers = {
        "timm": _copied(erasing),
        "torchvision": _each(v2.RandomErasing(1.0, (0.08, 0.082), (1.0, 1.0))),
    }
    attentive, cutmix = layers.AttentiveCutMix(nn.AvgPool2d(32)), v2.CutMix(num_classes=10)
    labels = torch.zeros(32, dtype=torch.int64)
    return [
        Race("DropBlock2d", MAPS, layers.DropBlock2d(0.1, 7), alone),
        Race(
            "DropBlock2d, channels together",
            MAPS,
            layers.DropBlock2d(0.1, 7, per_channel=False),
            {"timm": timm.layers.DropBlock2d(0.1, 7)},
        ),
        Race("DropBlock3d", (4, 64, 8, 14, 14), layers.DropBlock3d(0.1, 3), volumes),
        Race(
            "Cutout",
            (64, 3, 224, 224),
            layers.Cutout(64),
            erasers,
            "forward alone; the peers erase about the same area, image by image in a Python loop, "
            "which writes less than a mask over the batch",
            is_input=True,
        ),
        Race(
            "AttentiveCutMix",
            (32, 3, 224, 224),
            lambda x: attentive(x, labels, 10).images,
            {"torchvision": lambda x: cutmix(x, labels)[0]},
            "no public one; forward alone, without the network's, beside which it is nothing; "
            "CutMix pastes one box, the same in all images, and reads none of them to choose it",
            is_input=True,
        ),
    ]


def weights() -> list[Race]:
    """Return the comparisons of DropConnect."""
    weight, kernel = torch.randn(1024, 1024) / 32, torch.randn(256, 256, 3, 3) / 48
    connect, single = ds.layers.DropConnect(0.3), ds.layers.DropConnect(0.3, per_sample=True)

    def einsum(x: Tensor) -> Tensor:
        dropped = F.dropout(weight.expand(len(x), -1, -1), 0.3)
        return torch.einsum("ni,noi->no", x, dropped)

    return [
        Race(
            "DropConnect of a linear layer",
            (128, 1024),
            lambda x: F.linear(x, connect(weight)),
            {"torch": lambda x: F.linear(x, F.dropout(weight, 0.3))},
            ON_WEIGHT,
        ),
        Race(
            "DropConnect of a convolution",
            (16, 256, 14, 14),
            lambda x: F.conv2d(x, connect(kernel), padding=1),
            {"torch": lambda x: F.conv2d(x, F.dropout(kernel, 0.3), padding=1)},
            ON_WEIGHT,
        ),
        Race(
            "DropConnect, per sample",
            (16, 1024),
            lambda x: ds.layers.linear(x, single(weight, x)),
            {"torch": einsum},
            "no public one; against torch's dropout and einsum",
        ),
    ]


def races() -> list[Race]:
    """Return all comparisons."""
    return [*dropouts(), *blocks(), *weights()]


def _copied(function: Callable[[Tensor], Tensor]) -> Step:
    return lambda x: function(x.clone())


def _each(function: Callable[[Tensor], Tensor]) -> Step:
    return lambda x: torch.stack([function(image) for image in x])


def seconds(function: Step, x: Tensor) -> float:
    """Return the processor time of one step: forward, and backward where there are gradients."""
    x.grad = None
    start = time.process_time()
    y = function(x)
    if x.requires_grad:
        y.backward(torch.ones_like(y))
    return time.process_time() - start


def measure(race: Race, repeat: int) -> tuple[float, str, float, float, tuple[float, float]]:
    """Return ms of ours, the fastest peer's name and ms, the ratio, and its quartiles."""
    x = torch.randn(race.shape, requires_grad=not race.is_input)
    functions = {"": race.layer, **race.peers}
    for function in functions.values():
        seconds(function, x)
        seconds(function, x)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeat):
        for name, function in functions.items():
            times[name].append(seconds(function, x))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians.pop("")
    fastest = min(medians, key=medians.__getitem__)
    pairs = zip(times[""], times[fastest], strict=True)
    low, _, high = statistics.quantiles([left / right for left, right in pairs], n=4)
    return ours * 1e3, fastest, medians[fastest] * 1e3, ours / medians[fastest], (low, high)
