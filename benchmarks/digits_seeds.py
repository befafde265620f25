"""Digits with and without stochastic depth: accuracy and time over five seeds.

scikit-learn's handwritten digits (1,797 images), a CIFAR-style ResNet of 32 layers trained from
scratch, plain, with row masks, and with subsets (p_L = 0.5, the paper's linear rule). Each seed
splits the data, starts the weights and orders the batches anew, the same for the three. The clock
is the processor time of one thread, which other work on the machine disturbs least.

    python -m benchmarks.digits_seeds [--seeds 5] [--epochs 20] [--markdown docs/digits.md]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.demo import Digits, DigitsResNet, correct, load_digits

BATCH = 64
VARIANTS = ("plain", "row", "subset")


def network(variant: str, seed: int) -> nn.Module:
    """Return the network of a seed, with stochastic depth where asked for."""
    torch.manual_seed(seed)
    model = DigitsResNet(depth=5, dropout=0.0)
    return model if variant == "plain" else ds.retrofit(model, 0.5, mode=variant)  # type: ignore[arg-type]


def train(model: nn.Module, digits: Digits, seed: int, epochs: int) -> float:
    """Train in place; return the seconds of processor time that it took."""
    torch.manual_seed(1000 + seed)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * -(-len(digits.train.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    began = time.process_time()
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(digits.train.labels), generator=order).split(BATCH):
            loss = F.cross_entropy(model(digits.train.images[batch]), digits.train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return time.process_time() - began


def main() -> None:
    """Train, print and write a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    right: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for seed in range(options.seeds):
        digits = load_digits(seed)
        for variant in VARIANTS:
            model = network(variant, seed)
            seconds[variant].append(train(model, digits, seed, options.epochs))
            share = correct(model.eval(), digits.test) / len(digits.test.labels)
            right[variant].append(100 * share)
            print(seed, variant, right[variant][-1], seconds[variant][-1], flush=True)
    text = page(right, seconds, options.seeds, options.epochs, len(digits.test.labels))
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


def page(
    right: dict[str, list[float]],
    seconds: dict[str, list[float]],
    seeds: int,
    epochs: int,
    images: int,
) -> str:
    """Return the table as a page."""
    x = torch.empty(BATCH, 1, 16, 16)
    rows = []
    for variant in VARIANTS:
        ratios = [a / b for a, b in zip(seconds[variant], seconds["plain"], strict=True)]
        ideal = ds.expected_compute(network(variant, 0), (x,)).ratio
        rows.append(
            f"| {variant} | {statistics.fmean(right[variant]):.2f} ± "
            f"{statistics.stdev(right[variant]):.2f} | "
            f"{', '.join(f'{value:.2f}' for value in right[variant])} | "
            f"{statistics.fmean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) | "
            f"{ideal:.3f} |"
        )
    about = (
        f"{seeds} seeds, {epochs} epochs, batch {BATCH}, {images} test images; torch "
        f"{torch.__version__}, Python {platform.python_version()}, one thread."
    )
    return "\n".join(
        [
            "# Stochastic depth on the digits, over seeds",
            "",
            "`python -m benchmarks.digits_seeds --markdown docs/digits.md`. A ResNet of 32 layers "
            "trained from scratch, p_L = 0.5. Test accuracy in per cent: mean ± standard deviation "
            "over the seeds, and each; training time against the plain network's of the same seed "
            "(processor time), beside the share of the forward's operations that is run in "
            "expectation. With this few images the seeds differ by more than the variants do: the "
            "table claims nothing about accuracy beyond its figures.",
            "",
            "| training | accuracy, % | by seed | time against plain | operations |",
            "|---|---|---|---|---|",
            *rows,
            "",
            about,
            "",
        ]
    )


if __name__ == "__main__":
    main()
