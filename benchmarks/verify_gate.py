"""How far the ratios of `ds.verify` are from its limits, on exports that are right.

For each network and each seed of its weights: slim, export, verify, and print the ratios. The
worst ones are what the limits of `Gate` were set by.

    python benchmarks/verify_gate.py [NAME[:SIZE] ...] [--seeds N] [--output FILE]

All of it writes docs/verify_gate.json, from which docs/verify.md is made by verify_page.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

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

OUTPUT = Path(__file__).parents[1] / "docs" / "verify_gate.json"


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


def measure(entry: str, seed: int, slim: bool) -> dict[str, Any]:
    """Return the ratios of one export that is right, and their limits."""
    name, _, size = entry.rpartition(":")
    torch.manual_seed(seed)
    model = randomize(load_model(name).module, seed).eval()
    exported = ds.slim(model) if slim else model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ds.export_onnx(exported, path, torch.randn(1, 3, int(size), int(size)))
        start = time.perf_counter()
        verdict = ds.verify(model, path, surgered=exported if slim else None)
        seconds = time.perf_counter() - start
    output = verdict.outputs[0]
    return {
        "model": name,
        "size": int(size),
        "seed": seed,
        "slim": slim,
        "ok": verdict.ok,
        "own": output.reference_error,
        "ratios": {ratio.kind: ratio.value for ratio in output.ratios},
        "limits": {ratio.kind: ratio.limit for ratio in output.ratios},
        "algebra": None if output.algebra is None else output.algebra.error,
        "algebra limit": None if output.algebra is None else output.algebra.limit,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Print one line for each network and seed, and the worst ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    rows = []
    print(f"{'network':40} slim  seed  own error  {'   '.join(f'{k:>7}' for k in KINDS)}  seconds")
    for entry in options.models:
        for seed, slim in itertools.product(range(options.seeds), (False, True)):
            row = measure(entry, seed, slim)
            rows.append(row)
            print(
                f"{entry:40} {slim!s:5} {seed:4}  {row['own'] or 0:9.2e}  "
                + "   ".join(f"{row['ratios'].get(kind, 0.0):7.2f}" for kind in KINDS)
                + f"  {row['seconds']:7.1f}  {'' if row['ok'] else 'FALSE ALARM'}",
                flush=True,
            )
    worst = [max(row["ratios"].get(kind, 0.0) for row in rows) for kind in KINDS]
    print("worst:", "  ".join(f"{number:.2f}" for number in worst))
    document = {"torch": torch.__version__, "rows": rows}
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
