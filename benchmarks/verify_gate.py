"""How far the ratios of `ds.verify` are from its limits, on exports that are right.

For each network and each seed of its weights: slim, export, verify, and print the ratios. The
worst ones are what the limits of `Gate` were set by.

    python benchmarks/verify_gate.py [NAME[:SIZE] ...] [--seeds N]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import dropsurgery as ds
from dropsurgery.models import load_model
from dropsurgery.verify.verdict import KINDS

MODELS = (
    "torchvision:resnet18:64",
    "torchvision:resnet50:64",
    "torchvision:resnet152:64",
    "torchvision:mobilenet_v3_small:64",
    "torchvision:efficientnet_b0:64",
    "torchvision:convnext_tiny:64",
    "torchvision:swin_t:64",
    "torchvision:vit_b_16:224",
    "timm:vit_tiny_patch16_224:224",
    "timm:convnextv2_atto:64",
)


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Draw what a fresh model leaves constant: statistics, affine terms, zero heads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            if "running_var" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif bool((tensor == tensor.flatten()[0]).all()):
                scale = 0.2 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5
                tensor.add_(torch.randn(tensor.shape, generator=generator) * scale)
    return model


def main() -> None:
    """Print one line for each network and seed, and the worst ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    worst = [0.0] * len(KINDS)
    print(f"{'network':40} slim  seed  own error  {'   '.join(f'{k:>7}' for k in KINDS)}  seconds")
    for entry in options.models:
        name, _, size = entry.rpartition(":")
        for seed, slim in itertools.product(range(options.seeds), (False, True)):
            torch.manual_seed(seed)
            model = randomize(load_model(name).module, seed).eval()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.onnx"
                exported = ds.slim(model) if slim else model
                ds.export_onnx(exported, path, torch.randn(1, 3, int(size), int(size)))
                start = time.perf_counter()
                verdict = ds.verify(model, path)
                seconds = time.perf_counter() - start
            output = verdict.outputs[0]
            numbers = [ratio.value for ratio in output.ratios]
            worst = [max(pair) for pair in zip(worst, numbers, strict=True)]
            print(
                f"{entry:40} {slim!s:5} {seed:4}  {output.reference_error or 0:9.2e}  "
                + "   ".join(f"{number:7.2f}" for number in numbers)
                + f"  {seconds:7.1f}  {'' if verdict.ok else 'FALSE ALARM'}",
                flush=True,
            )
    print("worst:", "  ".join(f"{number:.2f}" for number in worst))


if __name__ == "__main__":
    main()
