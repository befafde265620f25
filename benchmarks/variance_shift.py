"""Dropout in front of BatchNorm: the shift of the variance, predicted and measured, and remedies.

A small DenseNet with dropout in each bottleneck is trained on scikit-learn's digits (8x8), five
seeds of each remedy. Written are the accuracies, whatever they are, and the shift by layer.

    python -m benchmarks.variance_shift [--seeds 5] [--epochs 16] [--markdown PAGE.md]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.demo import load_digits
from dropsurgery.passes.base import Pass
from dropsurgery.report import environment
from dropsurgery.variance_shift import VarianceShift

RATE = 0.5
BATCH = 64


class Bottleneck(nn.Module):
    """BN-ReLU-conv1x1-BN-ReLU-conv3x3-dropout, whose output joins its input (Huang et al. 2017)."""

    def __init__(self, channels: int, growth: int, p: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + growth, H, W)."""
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.drop(self.conv2(F.relu(self.norm2(y))))], 1)


class DenseNet(nn.Module):
    """Two dense blocks of six bottlenecks with a transition in between, for 8x8 grey images."""

    def __init__(self, p: float, growth: int = 8, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2 * growth, 3, padding=1, bias=False)
        channels, blocks = 2 * growth, []
        for block in range(2):
            for _ in range(depth):
                blocks.append(Bottleneck(channels, growth, p))
                channels += growth
            if block == 0:
                halved = nn.Conv2d(channels, channels // 2, 1, bias=False)
                blocks.append(
                    nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), halved, nn.AvgPool2d(2))
                )
                channels //= 2
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.BatchNorm2d(channels), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to class scores (N, 10)."""
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """Train with SGD on one learning-rate cycle, and return the network in eval mode."""
    torch.manual_seed(seed)
    network.train()
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for rows in order[: len(images) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers in percent."""
    with torch.no_grad():
        return 100.0 * (network.eval()(images).argmax(1) == labels).float().mean().item()


def converted(*passes: Pass) -> Callable[[nn.Module], nn.Module]:
    """Return what runs passes over a network."""
    return lambda network: ds.apply(network, *passes).module


REMEDIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "dropout 0.5 in each bottleneck": lambda network: network,
    "no dropout": converted(ds.ConvertDropout("identity")),
    "`MoveDropoutAfterLastNorm()`": converted(ds.MoveDropoutAfterLastNorm()),
    '`ConvertDropout("gaussian")`, same variance': converted(ds.ConvertDropout("gaussian")),
    '`ConvertDropout("uniform", beta=0.1)`, Uout': converted(
        ds.ConvertDropout("uniform", beta=0.1)
    ),
}
RECALIBRATED = "dropout 0.5, then `recalibrate_batchnorm`"


def main() -> None:
    """Train, measure, and write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    images, test = (split.images[:, :, ::2, ::2] for split in (digits.train, digits.test))
    results: dict[str, list[float]] = {}
    shift = None
    began = time.perf_counter()
    for seed in range(options.seeds):
        for name, remedy in REMEDIES.items():
            torch.manual_seed(seed)
            network = remedy(DenseNet(RATE))
            train(network, images, digits.train.labels, options.epochs, seed)
            results.setdefault(name, []).append(accuracy(network, test, digits.test.labels))
            if name == next(iter(REMEDIES)):
                fresh = ds.recalibrate_batchnorm(network, images.split(BATCH * 4))
                healed = accuracy(fresh, test, digits.test.labels)
                results.setdefault(RECALIBRATED, []).append(healed)
                if shift is None:
                    shift = ds.find_variance_shift(network, images.split(BATCH * 4))
            print(f"seed {seed} {name}: {results[name][-1]:.2f}", flush=True)
    assert shift is not None
    text = page(results, shift, options.epochs, time.perf_counter() - began)
    if options.markdown:
        picture = options.markdown.with_suffix(".png")
        shift.plot(picture)
        options.markdown.write_text(text.replace("PICTURE", picture.name))
    else:
        print(text)


def page(
    results: dict[str, list[float]],
    shift: VarianceShift,
    epochs: int,
    seconds: float,
) -> str:
    """Return the page."""
    known = [s for s in shift if s.predicted is not None and s.by_dropout is not None]
    worst = max(abs(s.predicted - s.by_dropout) for s in known)  # type: ignore[operator]
    lines = [
        "# Dropout in front of BatchNorm",
        "",
        "Li et al., *Understanding the Disharmony between Dropout and Batch Normalization by "
        "Variance Shift*, 2018, arXiv:1801.05134, on a small scale: a DenseNet of two blocks of "
        "six bottlenecks (growth 8), dropout 0.5 in each bottleneck, trained on scikit-learn's "
        f"digits (8x8, 1,097 training and 400 test images, {epochs} epochs). Written by "
        "`python -m benchmarks.variance_shift --markdown docs/variance_shift.md`.",
        "",
        "## The shift, by layer",
        "",
        "![ratios of the variance along the depth](PICTURE)",
        "",
        "*Predicted* is theory: what the dropouts that a BatchNorm sees add to the variance of "
        "what they are given. *Without / with* is the same ratio, measured in training mode with "
        f"everything before these dropouts alike; the two differ by {worst:.3f} at most. "
        "*Eval / training* is what a user gets: eval mode over training mode, with what earlier "
        "BatchNorms pass on. In the first block it follows the prediction. Behind the transition "
        "it does not: there the ReLU, the channels' correlation and the pooling treat noise and "
        "signal differently, so that eval has *more* variance than training, and the shift of the "
        "second block's own dropouts comes on top.",
        "",
        "| BatchNorm | dropouts it sees | predicted | without / with | eval / training |",
        "| --- | --- | --- | --- | --- |",
    ]
    for s in shift:
        ratios = (s.predicted, s.by_dropout, s.measured)
        cells = ("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        lines.append(f"| {s.path} | {len(s.dropouts)} | {' | '.join(cells)} |")
    lines += [
        "",
        "## What helps",
        "",
        f"Accuracy on the test images in percent, {len(next(iter(results.values())))} seeds.",
        "",
        "| network | mean | standard deviation | of each seed |",
        "| --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        spread = stdev(found) if len(found) > 1 else 0.0
        each = ", ".join(f"{value:.2f}" for value in found)
        lines.append(f"| {name} | {mean(found):.2f} | {spread:.2f} | {each} |")
    made = ", ".join(f"{key} {value}" for key, value in environment().items())
    return "\n".join([*lines, "", f"Measured with {made}, in {seconds:.0f} s.", ""])


if __name__ == "__main__":
    main()
