"""Slim a network, export it to ONNX, and prove the file equal to the network.

python examples/export_slim_graph.py --model timm:resnet50 --weights a1_in1k --out resnet50.onnx
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import torch

import dropsurgery as ds
from dropsurgery.models import load_model


def main() -> int:
    """Run the example; 1 if the file is not equal to the network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--weights", help="a file, or the hub's name, such as IMAGENET1K_V1")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path, help="the ONNX file to write")
    options = parser.parse_args()

    model = load_model(options.model, weights=options.weights).module
    example = torch.randn(1, 3, options.size, options.size)

    result = ds.apply(model, ds.ConvertDropout("identity"), ds.FoldBatchNorm())
    print(f"{len(result.changes)} changes, {len(result.skipped)} left alone")
    for skip in result.skipped:
        print(f"  {skip.module}: {skip.reason}")

    slim = ds.slim(model)  # the same passes, and drop paths taken out, in one call
    with tempfile.TemporaryDirectory() as scratch:
        path = options.out or Path(scratch) / "model.onnx"
        ds.export_onnx(slim, path, (example,))
        kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
        print(", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))

        verdict = ds.verify(model, path)  # against the network as it was, not the slim one
        print(verdict)
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
