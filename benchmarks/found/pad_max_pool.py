"""onnxruntime merges padding with zeros into max pooling, which pads with -inf.

Where the values at the border are negative, their maximum with the zeros of the Pad node is 0;
onnxruntime's optimiser (`Pad_Fusion`, from ORT_ENABLE_BASIC on) moves the padding into the MaxPool
node, which ignores it. Found in timm's resnetv2_50x1_bit, whose stem is built so.

    python -m benchmarks.found.pad_max_pool
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import dropsurgery as ds


def network(bias: float) -> nn.Sequential:
    """Return a network that pads with zeros before it pools, behind a bias of one sign."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)).eval()
    nn.init.constant_(model[0].bias, bias)
    return model


def main() -> None:
    """Export the two layers, and show that they are not equal."""
    model = network(-5.0)
    with tempfile.TemporaryDirectory() as folder:
        path = ds.export_onnx(model, Path(folder) / "m.onnx", torch.randn(2, 3, 9, 9))
        print(ds.verify(model, path).conclusion)
        print(ds.locate(model, path).conclusion)


if __name__ == "__main__":
    main()
