"""What `ds.verify` and `ds.locate` cost, in runs of the networks, measured side by side in one run.

For each model and each input that `verify` runs: the time of one plain onnxruntime run (a session
of its own, default options) and of one run of `model.double()`. Allowed are six of the former and
one of the latter for each input. `verify` is timed as it is called, with reading the file and
making its session; the set-up is told apart as well. `locate` is timed on a file in which one
weight has the wrong sign, and may take three times as long as `verify`.

Times are of the processor, not of the clock: the process keeps to one core and torch to one
thread, so that neither waiting nor other work on the machine counts.

    python -m benchmarks.verify [NAME ...] [--size 224] [--repeat 3] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dropsurgery as ds
from benchmarks.verify_gate import randomize
from dropsurgery.models import import_torchvision
from dropsurgery.verify.candidate import Candidate
from dropsurgery.verify.compare import comparison_cases

MODELS = ("resnet50", "vit_b_16")
RUNS = 6
LOCATING = 3
OUTPUT = Path(__file__).parents[1] / "docs" / "verify_cost.json"


def build(name: str, size: int) -> nn.Module:
    """Return a torchvision model in eval mode, for images of one size."""
    options: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
    torch.manual_seed(0)
    model: nn.Module = import_torchvision().models.get_model(name, **options)
    return randomize(model, 0).eval()


def seconds(function: Callable[[], object]) -> float:
    """Return how much time of the processor a call takes."""
    start = time.process_time()
    function()
    return time.process_time() - start


def inputs_of(model: nn.Module, path: Path) -> list[Tensor]:
    """Return the inputs that `verify` runs."""
    cases = comparison_cases(model, path, None, provider="cpu", seeds=(0, 1, 2), batch_sizes=(1, 3))
    return [next(iter((*case.args, *case.kwargs.values()))) for case in cases]


def broken(path: Path) -> Path:
    """Write the file again with the largest weight of a layer half-way down negated."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    matrices = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
    chosen = matrices[len(matrices) // 2]
    values = numpy_helper.to_array(chosen).copy()
    values.flat[abs(values).argmax()] *= -1
    chosen.CopyFrom(numpy_helper.from_array(values, chosen.name))
    target = path.with_stem(f"{path.stem}-broken")
    onnx.save(model, str(target))
    return target


def measure(name: str, size: int, repeat: int) -> dict[str, Any]:
    """Return the times of one model; every round takes each of them once, in turn."""
    import onnxruntime

    model = build(name, size)
    wide = copy.deepcopy(model).double()
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = ds.export_onnx(
            ds.slim(model), Path(folder) / "m.onnx", torch.randn(1, 3, size, size)
        )
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        inputs, wrong = inputs_of(model, path), broken(path)
        for index in range(repeat + 1):
            plain = [
                seconds(lambda x=x: session.run(None, {"x": x.numpy()}))  # type: ignore[misc]
                for x in inputs
            ]
            float64 = [seconds(lambda x=x: wide(x.double())) for x in inputs]  # type: ignore[misc]
            setup = seconds(lambda: Candidate(path, "cpu"))
            row = {
                "verify": seconds(lambda: _verified(model, path)),
                "locate": seconds(lambda: _located(model, wrong)),
                "setup": setup,
                "plain": sum(plain),
                "float64": sum(float64),
            }
            if index:  # the first round warms up
                rows.append(row)
    ratios = [r["verify"] / (RUNS * r["plain"] + r["float64"]) for r in rows]
    locating = [r["locate"] / r["verify"] for r in rows]
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {
        "model": name,
        "size": size,
        "inputs": len(inputs),
        "seconds": {key: round(value, 3) for key, value in medians.items()},
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "plain_runs": round((medians["verify"] - medians["float64"]) / medians["plain"], 2),
        "locating": round(statistics.median(locating), 3),
        "locating_range": [round(min(locating), 3), round(max(locating), 3)],
    }


def _verified(model: nn.Module, path: Path) -> None:
    verdict = ds.verify(model, path)
    assert verdict.ok, str(verdict)


def _located(model: nn.Module, path: Path) -> None:
    location = ds.locate(model, path)
    assert location.found, str(location)


def main() -> None:
    """Measure, print and write the times."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # onnxruntime takes a thread for each core it may use
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    found = []
    for name in options.models:
        found.append(measure(name, options.size, options.repeat))
        print(found[-1], flush=True)
    document = {
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "repeat": options.repeat,
        "allowed_plain_runs": RUNS,
        "allowed_locating": LOCATING,
        "models": found,
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
