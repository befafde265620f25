"""Retrofit a pretrained ResNet with stochastic depth, fine-tune it, and save the surgery.

    python examples/retrofit_pretrained_resnet.py --weights IMAGENET1K_V1

Without --weights the network is random: everything works the same, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import dropsurgery as ds
from dropsurgery.models import load_model


def fine_tune(net: nn.Module, steps: int, size: int) -> float:
    """Train on random images: put your own data loader here."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    net.train()  # drop paths draw
    for _ in range(steps):
        images, labels = torch.randn(8, 3, size, size), torch.randint(1000, (8,))
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()  # drop paths pass everything through
    return loss.item()


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--weights", help="a file, or the hub's name, such as IMAGENET1K_V1")
    parser.add_argument("--final-survival", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path, help="where to save the surgery")
    options = parser.parse_args()

    model = load_model(options.model, weights=options.weights).module
    print(ds.find_residuals(model))

    net = ds.retrofit(model, final_survival=options.final_survival)  # the paper's linear rule
    images = torch.randn(2, 3, options.size, options.size)
    with torch.no_grad():
        print("eval output bit-identical:", torch.equal(net(images), model(images)))
    print("same state-dict keys:", list(net.state_dict()) == list(model.state_dict()))

    print(f"loss after {options.steps} steps: {fine_tune(net, options.steps, options.size):.3f}")

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch) / "surgery"
        ds.save(net, folder)  # the passes as JSON, the weights as safetensors: no pickle
        fresh = load_model(options.model).module
        again = ds.load(folder, fresh).eval()
        with torch.no_grad():
            print("loaded again, bit-identical:", torch.equal(again(images), net(images)))


if __name__ == "__main__":
    main()
