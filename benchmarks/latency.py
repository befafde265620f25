"""Latency of slimmed networks: eager, compiled and in onnxruntime, in one interleaved run.

For each network and batch size, in every round each contender runs once, in turn:

- torch eager: the original, and `ds.slim` of it
- torch.compile (inductor): the same two
- onnxruntime with all optimisations: `torch.onnx.export` of the original with its defaults, that
  file through onnxslim, and `ds.export_onnx(ds.slim(…))`

A figure is the median over the rounds of ours over the peer of the same kind whose median is the
lowest, in the same round; in brackets the quartiles. Processor time of one thread; as many rounds
as fit into the time given to a case. The networks have random statistics and no parameter that is
left at 0 or 1, which a tool could fold away as no trained network would let it. glibc gives freed
memory back to the system and takes it anew, a page fault at a time, for one contender and not for
the next, by chance of their order; the script starts itself again with an environment that keeps
it.

    python -m benchmarks.latency [--models NAME ...] [--seconds 30] [--no-compile]
    python -m benchmarks.latency --page      docs/latency.md from docs/latency.json

Each model is written to docs/latency.json when it is done; models that stand there are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dropsurgery as ds
from benchmarks.half_precision import calibrated
from benchmarks.markdown import table

RESULTS = Path("docs/latency.json")
MODELS = {
    "resnet18": 224, "resnet50": 224, "mobilenetv2_050": 224, "mobilenetv3_small_050": 224,
    "efficientnet_b0": 224, "regnety_002": 224, "densenet121": 224, "resnetv2_50": 224,
    "repvgg_a0": 224, "mobileone_s0": 224, "fastvit_t8": 256, "levit_128s": 224,
    "visformer_tiny": 224, "xception41p": 160, "convmixer_768_32": 112, "convnext_atto": 224,
    "cait_xxs24_224": 224, "ghostnet_050": 224, "vit_tiny_patch16_224": 224, "hrnet_w18_small": 224,
}  # fmt: skip
BATCHES = (1, 16)
# Kind: the peers, and ours.
KINDS = {
    "eager": (("eager original",), "eager slim"),
    "compiled": (("compiled original",), "compiled slim"),
    "onnxruntime": (("export", "export + onnxslim"), "ours"),
}
NOISE = 1.02
FEWEST_ROUNDS, MOST_ROUNDS = 7, 60
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


def contenders(model: nn.Module, x: Tensor, compiled: bool) -> dict[str, Callable[[], object]]:
    """Return what runs one batch, by name."""
    slim = ds.slim(model, example_inputs=x)
    found: dict[str, Callable[[], object]] = {
        "eager original": lambda: model(x),
        "eager slim": lambda: slim(x),
    }
    if compiled:
        torch._dynamo.reset()
        for name, module in (("original", model), ("slim", slim)):
            fast = torch.compile(module)
            found[f"compiled {name}"] = lambda fast=fast: fast(x)  # type: ignore[misc]
    for name, run in onnx_contenders(model, slim, x):
        found[name] = run
    return found


def onnx_contenders(
    model: nn.Module, slim: nn.Module, x: Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a session of each ONNX file."""
    import onnx
    import onnxslim

    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(model, (x,), dynamo=True)
    proto = program.model_proto  # type: ignore[union-attr]
    yield "export", session(proto.SerializeToString(), x)
    yield "export + onnxslim", session(onnxslim.slim(proto).SerializeToString(), x)
    with tempfile.TemporaryDirectory() as folder:
        path = ds.export_onnx(slim, Path(folder) / "slim.onnx", x, dynamic_batch=False)
        yield "ours", session(onnx.load(path).SerializeToString(), x)


def session(content: bytes, x: Tensor) -> Callable[[], object]:
    """Return what runs a file once."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    opened = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {opened.get_inputs()[0].name: x.numpy()}
    return lambda: opened.run(None, feed)


def measure(name: str, batch: int, seconds: float, compiled: bool) -> dict[str, Any]:
    """Return the median seconds of each contender, and ours over the best peer by kind."""
    model = calibrated(name, MODELS[name], 0)
    x = torch.randn(batch, 3, MODELS[name], MODELS[name])
    with torch.no_grad():
        runs = contenders(model, x, compiled)
        for _ in range(2):  # the first calls compile and allocate
            timed(runs)
        times = [timed(runs)]
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, round(seconds / sum(times[0].values()))))
        times += [timed(runs) for _ in range(rounds - 1)]
    found: dict[str, Any] = {key: statistics.median(row[key] for row in times) for key in runs}
    for kind, (peers, own) in KINDS.items():
        if own in runs:
            best = min(peers, key=lambda peer: found[peer])
            quartiles = statistics.quantiles(row[own] / row[best] for row in times)
            low, ratio, high = quartiles
            found[kind] = {"ratio": ratio, "low": low, "high": high, "rounds": rounds}
    return found


def timed(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the processor time of one run of each contender."""
    times = {}
    for key, run in runs.items():
        start = time.process_time()
        run()
        times[key] = time.process_time() - start
    return times


def page(document: dict[str, Any]) -> str:
    """Return docs/latency.md."""
    rows, judged = [], []
    for case, found in document["cases"].items():
        cells = [*case.split(":")]
        for kind in KINDS:
            entry = found.get(kind)
            cells.append("-" if entry is None else _told(entry))
            if entry is not None:
                judged.append((kind, case, entry["ratio"]))
        rows.append(cells)
    lines = []
    for kind in KINDS:
        own = [(case, ratio) for which, case, ratio in judged if which == kind]
        if own:
            slower = [f"{case} {ratio:.2f}" for case, ratio in own if ratio > NOISE]
            faster = sum(ratio < 1 / NOISE for _, ratio in own)
            lines.append(
                f"- {kind}: median {statistics.median(r for _, r in own):.3f}; faster on {faster} "
                f"of {len(own)}; slower than {NOISE}: {', '.join(slower) or 'none'}"
            )
    about = (__doc__ or "").split("\n\n", 1)[1].partition("    python")[0].strip()
    return "\n\n".join((
        "# Latency of slimmed networks",
        f"`python -m benchmarks.latency`, then `--page`. {document['about']}",
        about,
        "\n".join(lines),
        table(("network", "batch", *KINDS), rows),
    )) + "\n"  # fmt: skip


def _told(entry: dict[str, float]) -> str:
    return f"{entry['ratio']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=30.0, help="for the rounds of one case")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--page", action="store_true", help="write docs/latency.md")
    options = parser.parse_args()
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    if options.page:
        RESULTS.with_suffix(".md").write_text(page(document))
        return
    if any(os.environ.get(key) != value for key, value in KEEP_MEMORY.items()):
        command = [sys.executable, "-m", "benchmarks.latency", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **KEEP_MEMORY})
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in options.models:
        for batch in BATCHES:
            case = f"{name}:{batch}"
            if case in document["cases"]:
                continue
            found = measure(name, batch, options.seconds, not options.no_compile)
            document["cases"][case] = found
            document["about"] = f"torch {torch.__version__}, {platform.machine()}, one thread."
            RESULTS.write_text(json.dumps(document, indent=1) + "\n")
            print(case, {kind: found.get(kind) for kind in KINDS}, flush=True)


if __name__ == "__main__":
    main()
