"""What surgery costs, as ratios to what it is built on, measured side by side in one run.

1. trace + find_residuals + InsertDropPath, against `torch.fx.symbolic_trace` (asked: at most 3).
2. FoldBatchNorm, with its trace, against `torch.fx.experimental.optimization.fuse` (at most 2).
3. Peak memory of `slim`, against the model's own size (at most 2.5, the model included).
4. `slim` of networks of about 300 million parameters: its time beyond tracing, against
   `copy.deepcopy` of the network (at most 4), and its peak memory (at most 2.3).

Each pair is timed in turn, A B A B …, after a warm-up; the ratio is that of the medians, with the
smallest and largest ratio of a pair behind it. Memory is read in a process of its own as the growth
of the peak resident set, on top of the model's parameters and buffers.

    python benchmarks/overhead.py [--repeat 15] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import copy
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
from dropsurgery.models import import_timm, import_torchvision

MODELS = ("resnet152", "vit_b_16")
LARGE = ("timm:regnety_640", "timm:convnext_xlarge")
SIDE = 64  # of the example input of the large ones


def build(name: str) -> nn.Module:
    """Return a model in eval mode, of torchvision unless the name says timm."""
    if name.startswith("timm:"):
        model: nn.Module = import_timm().create_model(name.removeprefix("timm:"))
    else:
        model = import_torchvision().models.get_model(name)
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


def slim_of(model: nn.Module) -> object:
    """Slim a network with its shapes known."""
    return ds.slim(model, example_inputs=torch.zeros(1, 3, SIDE, SIDE))


def trace_of(model: nn.Module) -> object:
    """Trace it with its shapes known, as slim does first."""
    return ds.trace(model, example_inputs=torch.zeros(1, 3, SIDE, SIDE))


def beyond_tracing(name: str, repeat: int) -> tuple[float, float, float, float, float]:
    """Return median ms of slim without its trace and of deepcopy, their ratio, and its range."""
    model = build(name)
    times = [
        (seconds(slim_of, model), seconds(trace_of, model), seconds(copy.deepcopy, model))
        for _ in range(repeat + 1)
    ][1:]
    slims, traces, copies = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [(slim - traced) / copied for slim, traced, copied in times]
    own = slims - traces
    return own * 1e3, copies * 1e3, own / copies, min(ratios), max(ratios)


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
    slim = slim_of(model) if name in LARGE else ds.slim(model)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del slim, ballast
    return (size + after - before) / size


def resident() -> int:
    """Return the resident set of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def memory_row(name: str, asked: float) -> tuple[object, ...]:
    """Return the line of the peak memory, each time in a process of its own."""
    command = [sys.executable, __file__, "--peak", name]
    peaks = [float(subprocess.check_output(command, text=True)) for _ in range(3)]
    span = f"{min(peaks):.2f} to {max(peaks):.2f}"
    peak = f"{statistics.median(peaks):.2f}"
    return (name, "peak memory of slim", "model size", "", peak, span, asked)


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
        rows.append(memory_row(name, 2.5))
    for name in LARGE:
        first, second, ratio, low, high = beyond_tracing(name, max(3, options.repeat // 5))
        measured = f"{first:.0f} ms / {second:.0f} ms"
        span = f"{low:.2f} to {high:.2f}"
        what = "slim, without its trace"
        rows.append((name, what, "copy.deepcopy", measured, f"{ratio:.2f}", span, 4.0))
        rows.append(memory_row(name, 2.3))
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
