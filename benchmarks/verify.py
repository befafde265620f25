"""What `ds.verify` costs, in runs of the networks themselves, measured side by side in one run.

For each model and each input that `verify` runs: the time of one plain onnxruntime run (a session
of its own, default options) and of one run of `model.double()`. Allowed are six of the former and
one of the latter for each input. `verify` is timed as it is called, with reading the file and
making its session; the set-up is told apart as well.

    python -m benchmarks.verify [NAME ...] [--size 96] [--repeat 3] [--output docs/verify_cost.json]
"""

from __future__ import annotations

import argparse
import copy
import json
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
OUTPUT = Path(__file__).parents[1] / "docs" / "verify_cost.json"


def build(name: str, size: int) -> nn.Module:
    """Return a torchvision model in eval mode, for images of one size."""
    options: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
    torch.manual_seed(0)
    model: nn.Module = import_torchvision().models.get_model(name, **options)
    return randomize(model, 0).eval()


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def inputs_of(model: nn.Module, path: Path) -> list[Tensor]:
    """Return the inputs that `verify` runs."""
    cases = comparison_cases(model, path, None, provider="cpu", seeds=(0, 1, 2), batch_sizes=(1, 3))
    return [next(iter((*case.args, *case.kwargs.values()))) for case in cases]


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
        inputs = inputs_of(model, path)
        for index in range(repeat + 1):
            plain = [
                seconds(lambda x=x: session.run(None, {"x": x.numpy()}))  # type: ignore[misc]
                for x in inputs
            ]
            float64 = [seconds(lambda x=x: wide(x.double())) for x in inputs]  # type: ignore[misc]
            setup = seconds(lambda: Candidate(path, "cpu"))
            row = {
                "verify": seconds(lambda: _verified(model, path)),
                "setup": setup,
                "plain": sum(plain),
                "float64": sum(float64),
            }
            if index:  # the first round warms up
                rows.append(row)
    ratios = [r["verify"] / (RUNS * r["plain"] + r["float64"]) for r in rows]
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {
        "model": name,
        "size": size,
        "inputs": len(inputs),
        "seconds": {key: round(value, 3) for key, value in medians.items()},
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "plain_runs": round((medians["verify"] - medians["float64"]) / medians["plain"], 2),
    }


def _verified(model: nn.Module, path: Path) -> None:
    verdict = ds.verify(model, path)
    assert verdict.ok, str(verdict)


def main() -> None:
    """Measure, print and write the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--size", type=int, default=96)
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
        "models": found,
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
