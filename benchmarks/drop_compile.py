"""Each drop layer under `torch.compile` with inductor, at several rates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch._dynamo.utils import counters

from dropsurgery import layers
from dropsurgery.graph.drops import set_rate

RATES = (0.1, 0.5, 0.3, 0.7)
COLUMNS = ("layer", "graphs for 4 rates", "breaks", "dropped at .1, .5, .3, .7")

LAYERS: dict[str, tuple[Callable[[float], nn.Module], tuple[int, ...]]] = {
    "Dropout": (layers.Dropout, (256, 64)),
    "Dropout1d": (layers.Dropout1d, (256, 64, 5)),
    "Dropout2d": (layers.Dropout2d, (256, 64, 5, 4)),
    "Dropout3d": (layers.Dropout3d, (256, 64, 3, 2, 2)),
    "ClassicDropout": (layers.ClassicDropout, (256, 64)),
    "GaussianDropout": (layers.GaussianDropout, (256, 64)),
    "UniformDropout": (layers.UniformDropout.matching, (256, 64)),
    "DropBlock2d": (lambda p: layers.DropBlock2d(p, 3), (256, 16, 9, 8)),
    "DropBlock3d": (lambda p: layers.DropBlock3d(p, 2), (256, 16, 5, 4, 6)),
    "DropConnect": (layers.DropConnect, (256, 64)),
    "WeightedChannelDropout": (layers.WeightedChannelDropout, (256, 50, 3, 2)),
    "Cutout": (lambda p: layers.Cutout(40, p), (512, 3, 9, 8)),
}


def rows() -> list[tuple[str, ...]]:
    """Compile a training step of each layer, and run it at each rate without compiling anew."""
    found = []
    for name, (build, shape) in LAYERS.items():
        torch._dynamo.reset()
        counters.clear()
        layer = build(RATES[0]).train()
        compiled = torch.compile(layer, fullgraph=True)
        shares = []
        for p in RATES:
            set_rate(layer, p)
            x = (torch.rand(shape) + 0.5).requires_grad_()
            y = compiled(x)
            y.sum().backward()
            shares.append(f"{float((y == 0).double().mean()):.2f}")
        noise = name in ("GaussianDropout", "UniformDropout")
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        dropped = "- (noise drops nothing)" if noise else ", ".join(shares)
        found.append((name, str(graphs), str(breaks), dropped))
    return found
