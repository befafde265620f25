"""How find_residuals grows with the network: its time against that of tracing, in one run.

ResNet-110 and -1202 for CIFAR (He et al. 2016) and chains of residual blocks up to 10,000 nodes, on
the meta device. Each is traced and analysed in turn, in processor time (both are plain Python, on
one thread), with the garbage collector off while the clock runs. Medians, and their ratio, which
should stay below 0.5 and should not grow with the network.

    python benchmarks/scaling.py [--repeat 5] [--markdown docs/scaling.md]
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import dropsurgery as ds

LIMIT = 0.5


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip, which a strided 1x1 convolution projects where it must."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if inputs == outputs
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(branch + skip)."""
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(branch + self.shortcut(x))


def resnet(depth: int) -> nn.Sequential:
    """Return the CIFAR ResNet of 6n + 2 layers."""
    n = (depth - 2) // 6
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for outputs in (16, 32, 64):
        for index in range(n):
            stride = 2 if index == 0 and outputs != 16 else 1
            layers.append(BasicBlock(width, outputs, stride))
            width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class PreNorm(nn.Module):
    """x + f(x) twice, as in a transformer: a chain whose stream nothing interrupts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream with two branches added."""
        x = x + self.act(self.fc1(self.norm1(x)))
        return x + self.act(self.fc2(self.norm2(x)))


def chain(nodes: int) -> nn.Sequential:
    """Return blocks that trace to about `nodes` nodes."""
    return nn.Sequential(*(PreNorm(8) for _ in range(nodes // 8)))


CASES = (
    ("ResNet-110", lambda: resnet(110)),
    ("ResNet-1202", lambda: resnet(1202)),
    ("chain of 2,500 nodes", lambda: chain(2_500)),
    ("chain of 5,000 nodes", lambda: chain(5_000)),
    ("chain of 10,000 nodes", lambda: chain(10_000)),
)


def measure(model: nn.Module, repeat: int) -> tuple[int, int, list[float], list[float]]:
    """Return nodes, sites, and the seconds that tracing and find_residuals took each time."""
    traces, finds = [], []
    graph = ds.trace(model)
    found = ds.find_residuals(graph)
    for _ in range(repeat):
        # A graph is full of cycles: collecting an old one must fall into neither time.
        gc.collect()
        gc.disable()
        start = time.process_time()
        graph = ds.trace(model)
        middle = time.process_time()
        found = ds.find_residuals(graph)
        finds.append(time.process_time() - middle)
        traces.append(middle - start)
        gc.enable()
    return len(graph.graph.nodes), len(found.sites), traces, finds


def main() -> None:
    """Measure, print a table, and say whether the ratio keeps its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="times that each case is measured")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    rows, ratios = [], []
    for name, build in CASES:
        with torch.device("meta"):
            model = build().eval()
        nodes, sites, traces, finds = measure(model, options.repeat)
        trace, find = statistics.median(traces), statistics.median(finds)
        pairs = [f / t for t, f in zip(traces, finds, strict=True)]
        ratios.append(find / trace)
        rows.append(
            (name, nodes, sites, f"{trace * 1e3:.0f} ms", f"{find * 1e3:.0f} ms",
             f"{find / nodes * 1e6:.1f} µs", f"{find / trace:.3f}",
             f"{min(pairs):.3f} to {max(pairs):.3f}")
        )  # fmt: skip
    header = ("network", "nodes", "sites", "trace", "find_residuals", "per node", "ratio", "range")
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ("---",) * 8, *rows)]
    verdict = "holds" if max(ratios) < LIMIT else "does NOT hold"
    text = "\n".join(
        [
            *lines,
            "",
            f"Asked: a ratio below {LIMIT} that does not grow. The limit {verdict}; the largest "
            f"network's ratio is {ratios[-1] / ratios[2]:.2f} times that of a quarter of it.",
            "",
            f"torch {torch.__version__}, Python {platform.python_version()}, medians of "
            f"{options.repeat} runs.",
        ]
    )
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(exist_ok=True)
        options.markdown.write_text(
            f"# How finding residuals scales\n\n`python benchmarks/scaling.py`\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
