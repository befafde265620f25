"""Networks to be trained by one step each, plain and with stochastic depth of every kind."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dropsurgery as ds
from benchmarks.scaling import resnet
from dropsurgery.graph import lower
from dropsurgery.layers.rows import Rows
from dropsurgery.models import import_torchvision


def vit(**options: Any) -> nn.Module:
    """Return timm's ViT-S/16 for 96 px."""
    return timm_model("vit_small_patch16_224", img_size=96, **options)


def convnext(**options: Any) -> nn.Module:
    """Return timm's ConvNeXt-T."""
    return timm_model("convnext_tiny", **options)


def swin(**options: Any) -> nn.Module:
    """Return timm's Swin-T for 112 px."""
    return timm_model("swin_tiny_patch4_window7_224", img_size=112, **options)


def resnet50(**options: Any) -> nn.Module:
    """Return timm's ResNet-50, the architecture of torchvision's."""
    return timm_model("resnet50", **options)


def timm_model(name: str, **options: Any) -> nn.Module:
    """Return a timm model of ten classes."""
    import_torchvision()
    import timm

    return timm.create_model(name, num_classes=10, **options)


# Name, builder (with the options of timm's own drop path where it has one), image size.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "resnet110": (lambda **_: resnet(110), 32),
    "resnet50": (resnet50, 128),
    "vit_small": (vit, 96),
    "convnext_tiny": (convnext, 96),
    "swin_tiny": (swin, 112),
}
# Patterns for the modules of its stages; ResNet-110 here has no module for one.
STAGES = {
    "resnet110": ("stage 1", "stage 2", "stage 3"),
    "resnet50": ("layer1*", "layer2*", "layer3*", "layer4*"),
    "vit_small": ("blocks*",),
    "convnext_tiny": ("stages.0*", "stages.1*", "stages.2*", "stages.3*"),
    "swin_tiny": ("layers.0*", "layers.1*", "layers.2*", "layers.3*"),
}


class Step:
    """One network, and what is needed to train it by one step.

    Args:
        module: the network; it is trained in place.
        inputs: images and labels.
        every_parameter: let the optimiser run for parameters without gradient too.
    """

    def __init__(
        self, module: nn.Module, inputs: tuple[Tensor, Tensor], every_parameter: bool = False
    ) -> None:
        self.module = module.train()
        self.x, self.y = inputs
        self.zeros = [(p, torch.zeros_like(p)) for p in module.parameters() if every_parameter]
        self.optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)
        self.dropped: set[str] = set()

    def __call__(self) -> float:
        """Train by one step; return its processor time in seconds."""
        self.dropped.clear()
        start = time.process_time()
        self.optimizer.zero_grad()
        F.cross_entropy(self.module(self.x), self.y).backward()
        for parameter, zero in self.zeros:
            if parameter.grad is None:
                parameter.grad = zero
        self.optimizer.step()
        return time.process_time() - start


def inputs_of(name: str, batch: int) -> tuple[Tensor, Tensor]:
    """Return random images and labels."""
    size = NETWORKS[name][1]
    return torch.randn(batch, 3, size, size), torch.randint(10, (batch,))


def retrofitted(name: str, final: float, mode: str, **options: Any) -> fx.GraphModule:
    """Return a network with drop path under the paper's rule."""
    model = NETWORKS[name][0]()
    insertion = ds.InsertDropPath(ds.survival.linear(final), mode=mode, **options)  # type: ignore[arg-type]
    return ds.apply(model, insertion).module


def without(name: str, stage: str) -> fx.GraphModule:
    """Return a network whose branches of one stage are never run in training."""
    insertion = ds.InsertDropPath(
        ds.survival.constant(0.0), mode="batch", where=where_of(name, stage)
    )
    return ds.apply(NETWORKS[name][0](), insertion).module


def share_run(compute: ds.Compute, runs: dict[str, float]) -> float:
    """Return the share of the forward's operations that is run, by the share of each site's."""
    saved = sum(site.flops * (1.0 - runs[site.path]) for site in compute.sites)
    return 1.0 - saved / compute.total


def where_of(name: str, stage: str) -> Any:
    """Return the choice of the sites of a stage."""
    if name != "resnet110":
        return stage
    first = 18 * (int(stage[-1]) - 1)
    return lambda site: first < site.block <= first + 18


# DINOv2's way, as its block.py describes it: int(B·p) samples, gathered by indexing and added by
# index_add on flattened rows, above a drop probability of 0.1 only.


def dinov2(module: fx.GraphModule) -> fx.GraphModule:
    """Return a module with "subset" whose rows are drawn and added in DINOv2's way."""
    for layer in module.modules():
        if isinstance(layer, ds.DropPath):
            layer.rows = lambda x, *_, layer=layer: dinov2_rows(layer, x)  # type: ignore
            layer.mode = "subset"
    names = {
        "take_rows": dinov2_take,
        "split_rows": dinov2_split,
        "add_rows": dinov2_add,
        "_add_over": lambda _, *operands: dinov2_add(*operands),
    }
    previous = {name: getattr(lower, name) for name in names}
    for name, function in names.items():
        setattr(lower, name, function)
    module.recompile()
    for name, function in previous.items():
        setattr(lower, name, function)
    return module


def dinov2_rows(layer: ds.DropPath, x: Tensor) -> Rows | None:
    """Draw int(B·p) samples, scaled by B over that."""
    batch = x.shape[0]
    if not layer.training or layer.drop_prob <= 0.1:
        return None
    count = max(int(batch * (1 - layer.drop_prob)), 1)
    return Rows(torch.randperm(batch)[:count], None, None, batch / count)


def dinov2_take(x: Tensor, rows: Rows | None, axis: int = 0) -> Tensor:
    """Gather by indexing."""
    return x if rows is None else x[rows.index]


def dinov2_split(x: Tensor, rows: Rows | None, *_: Any) -> tuple[Tensor, Tensor]:
    """Gather by indexing, and leave the sum of the gradients to autograd."""
    return x, dinov2_take(x, rows)


def dinov2_add(skip: Tensor, branch: Tensor, rows: Rows | None, *_: Any) -> Tensor:
    """Add flattened rows."""
    if rows is None:
        return skip + branch
    assert rows.index is not None
    total = torch.index_add(
        skip.flatten(1), 0, rows.index, branch.flatten(1).to(skip.dtype), alpha=rows.scale
    )
    return total.view_as(skip)
