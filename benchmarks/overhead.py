"""What surgery costs, as ratios to what it is built on, measured side by side in one run.

1. trace + find_residuals + InsertDropPath, against `torch.fx.symbolic_trace` (asked: at most 3).
2. FoldBatchNorm, with its trace, against `torch.fx.experimental.optimization.fuse` (at most 2).
3. Peak memory of `slim`, against the model's own size (at most 2.5, the model included).

Each pair is timed in turn, A B A B …, after a warm-up; the ratio is that of the medians, with the
smallest and largest ratio of a pair behind it. Memory is read in a process of its own as the growth
of the peak resident set, on top of the model's parameters and buffers.

    python benchmarks/overhead.py [--repeat 15] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import gc
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import dropsurgery as ds
from dropsurgery.models import import_torchvision

MODELS = ("resnet152", "vit_b_16")


def build(name: str) -> nn.Module:
    """Return a torchvision model in eval mode."""
    model: nn.Module = import_torchvision().models.get_model(name)
    return model.eval()


def retrofit(model: nn.Module) -> object:
    """Trace, find the residuals and insert drop path."""
    return ds.apply(model, ds.InsertDropPath(ds.survival.linear(0.8)))


def fold(model: nn.Module) -> object:
    """Trace and fold."""
    return ds.apply(model, ds.FoldBatchNorm())


def torch_fuse(model: nn.Module) -> object:
    """Fold with torch's own fuser, which copies the model first."""
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def seconds(function: Callable[[nn.Module], object], model: nn.Module) -> float:
    """Return how long one call takes."""
    gc.collect()
    start = time.perf_counter()
    function(model)
    return time.perf_counter() - start


def compare(
    ours: Callable[[nn.Module], object],
    theirs: Callable[[nn.Module], object],
    model: nn.Module,
    repeat: int,
) -> tuple[float, float, float, float, float]:
    """Return median ms of ours and theirs, their ratio, and the range of paired ratios."""
    ours(model)
    theirs(model)
    pairs = [(seconds(ours, model), seconds(theirs, model)) for _ in range(repeat)]
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = [left / right for left, right in pairs]
    return first * 1e3, second * 1e3, first / second, min(ratios), max(ratios)


def peak_ratio(name: str) -> float:
    """Return (model + growth of the peak during slim) / model, in bytes."""
    model = build(name)
    ds.slim(build("resnet18"))  # what the first call imports and allocates is not slim's
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    gc.collect()
    # The peak so far may hide growth: touch memory until the peak is where the process now is.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ballast = []
    while resident() < before:
        ballast.append(torch.ones(2**18))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    slim = ds.slim(model)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del slim, ballast
    return (size + after - before) / size


def resident() -> int:
    """Return the resident set of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=15, help="timed pairs of each comparison")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_ratio(options.peak))
        return
    warnings.simplefilter("ignore")
    rows = []
    for name in MODELS:
        model = build(name)
        cases = [
            ("trace + find + insert", "fx.symbolic_trace", retrofit, torch.fx.symbolic_trace, 3.0),
            ("FoldBatchNorm", "fx fuse", fold, torch_fuse, 2.0),
        ]
        for ours, theirs, function, peer, asked in cases:
            first, second, ratio, low, high = compare(function, peer, model, options.repeat)
            measured = f"{first:.0f} ms / {second:.0f} ms"
            rows.append(
                (name, ours, theirs, measured, f"{ratio:.2f}", f"{low:.2f} to {high:.2f}", asked)
            )
        command = [sys.executable, __file__, "--peak", name]
        peaks = [float(subprocess.check_output(command, text=True)) for _ in range(3)]
        peak = statistics.median(peaks)
        span = f"{min(peaks):.2f} to {max(peaks):.2f}"
        rows.append((name, "peak memory of slim", "model size", "", f"{peak:.2f}", span, 2.5))
    header = ("model", "ours", "against", "medians", "ratio", "range", "asked, at most")
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ("---",) * 7, *rows)]
    about = (
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, {options.repeat} pairs."
    )
    text = "\n".join([*lines, "", about])
    print(text)
    if options.markdown:
        options.markdown.write_text(
            f"# What surgery costs\n\n`python benchmarks/overhead.py`\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
