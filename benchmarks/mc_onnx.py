"""Whether Monte-Carlo dropout stays random in ONNX: torch and onnxruntime, many draws of each.

resnet18 with dropout is converted, exported and run under onnxruntime with all optimisations. For
every logit, mean and variance over the draws are compared with torch's, in standard errors of their
difference. The same test is run on two graphs that people get elsewhere: one whose masks became
constants, and one with ONNX Dropout nodes in training mode. It must fail on both.

    python -m benchmarks.mc_onnx [--draws 2000] [--markdown docs/mc_onnx.md]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dropsurgery as ds
from dropsurgery.models import import_torchvision
from dropsurgery.report import environment

LIMIT = 4.0  # standard errors
SEED = 1
SEEDS = (
    "onnxruntime seeds its generators when a session is made, from one number a process: two "
    "sessions of one file draw the same numbers, one after the other. "
    "`onnxruntime.set_seed` before the session is made chooses another."
)
ROWS = 50  # draws side by side in one run
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """How far two sets of draws are apart, in standard errors; the worst over all outputs."""

    mean: float
    variance: float

    @property
    def ok(self) -> bool:
        """Whether both are within the limit."""
        return self.mean <= LIMIT and self.variance <= LIMIT


def compare(first: Tensor, second: Tensor) -> Agreement:
    """Compare draws (draws, …) of each output: means, and variances by their fourth moments."""
    moments = []
    for draws in (first.double(), second.double()):
        mean, variance = draws.mean(0), draws.var(0)
        fourth = (draws - mean).pow(4).mean(0)
        error = (fourth - variance.square()).clamp(min=0) / len(draws)
        moments.append((mean, variance, variance / len(draws), error))
    (mean, variance, own, spread), (other_mean, other, theirs, other_spread) = moments
    tiny = torch.finfo(torch.float64).tiny
    by_mean = (mean - other_mean).abs() / (own + theirs).clamp(min=tiny).sqrt()
    by_variance = (variance - other).abs() / (spread + other_spread).clamp(min=tiny).sqrt()
    return Agreement(by_mean.max().item(), by_variance.max().item())


def draws_of(run: Run, x: Tensor, count: int) -> Tensor:
    """Return `count` draws (count, N, …) of a network's output for x, ROWS of them in each run."""
    found = []
    while sum(map(len, found)) < count:
        rows = min(ROWS, count - sum(map(len, found)))
        found.append(run(torch.cat([x] * rows)).unflatten(0, (rows, len(x))))
    return torch.cat(found)


def session(path: Path) -> Run:
    """Return a run of a file under onnxruntime with all optimisations, from a fixed seed."""
    import onnxruntime

    onnxruntime.set_seed(SEED)  # which counts for the sessions made afterwards
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    found = onnxruntime.InferenceSession(str(path), options)
    name = found.get_inputs()[0].name
    return lambda x: torch.from_numpy(found.run(None, {name: x.numpy()})[0])


def frozen(path: Path, rows: int) -> Path:
    """Write the graph with each of its draws replaced by one draw that is a constant."""
    import numpy as np
    import onnx

    model = onnx.load(path)
    shapes = {
        value.name: [d.dim_value or rows for d in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    generator = np.random.default_rng(0)
    for node in [n for n in model.graph.node if n.op_type == "RandomUniformLike"]:
        values = generator.random(shapes[node.output[0]], dtype=np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, node.output[0]))
        model.graph.node.remove(node)
    target = path.with_name("frozen.onnx")
    onnx.save(model, target)
    return target


def with_dropout_nodes(path: Path, p: float) -> Path:
    """Write the graph with ONNX Dropout in training mode in place of draw, comparison, product."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    made = {output: node for node in graph.node for output in node.output}
    for name, value in (("ratio", p), ("on", True)):
        dtype = onnx.TensorProto.FLOAT if name == "ratio" else onnx.TensorProto.BOOL
        graph.initializer.append(onnx.helper.make_tensor(name, dtype, [], [value]))
    for index, node in enumerate(graph.node):
        source = made.get(node.input[1]) if node.op_type == "Mul" else None
        if source is not None and _draws(source, made):
            names = [node.input[0], "ratio", "on"]
            drop = onnx.helper.make_node("Dropout", names, list(node.output), name=node.name)
            graph.node.remove(node)
            graph.node.insert(index, drop)
    target = path.with_name("dropout.onnx")
    onnx.save(model, target)
    return target


def _draws(node: Any, made: dict[str, Any]) -> bool:
    """Say whether a product is a mask: of a cast comparison with a draw, and a constant."""
    chain = []
    while node is not None:
        chain.append(node.op_type)
        node = made.get(node.input[0])
        if chain[-1] == "RandomUniformLike":
            break
    return chain == ["Mul", "Cast", "GreaterOrEqual", "RandomUniformLike"]


def resnet_with_dropout(p: float = 0.3) -> nn.Module:
    """Return resnet18 for 10 classes, with dropout behind every stage and before the head."""
    torchvision = import_torchvision()
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        setattr(model, name, nn.Sequential(getattr(model, name), nn.Dropout(p)))
    model.fc = nn.Sequential(nn.Dropout(p), model.fc)
    return model.eval()


def main() -> None:
    """Run the test on the three graphs, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = resnet_with_dropout()
    network = ds.apply(model, ds.ConvertDropout("monte-carlo")).module
    x = torch.randn(4, 3, options.size, options.size, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = ds.export_onnx(network, Path(folder) / "model.onnx", x)
        fixed = frozen(path, ROWS * len(x))
        nodes = with_dropout_nodes(path, 0.3)
        torch.manual_seed(SEED)
        reference = draws_of(network, x, options.draws)
        rows = []
        for name, run in (
            ("torch, drawn again", network),
            ("onnxruntime, `RandomUniformLike`", session(path)),
            ("onnxruntime, masks of all rows constant", session(fixed)),
            ("onnxruntime, `Dropout` nodes with `training_mode`", session(nodes)),
        ):
            began = time.perf_counter()
            draws = draws_of(run, x, options.draws)
            seconds = time.perf_counter() - began
            agreement = compare(reference, draws)
            again = draws_of(run, x, ROWS)
            changed = not torch.equal(again, draws_of(run, x, ROWS))
            rows.append((name, agreement, changed, seconds))
            print(rows[-1], flush=True)
    text = page(rows, options.draws, options.size)
    if options.markdown:
        options.markdown.write_text(text)
    else:
        print(text)


def page(rows: list[tuple[str, Agreement, bool, float]], draws: int, size: int) -> str:
    """Return the page."""
    lines = [
        "# Monte-Carlo dropout in ONNX",
        "",
        f"resnet18 with 10 classes and dropout 0.3 behind every stage and before the head, "
        f"{draws:,} draws for each of 4 images of {size}x{size} ({ROWS} draws side by side in a "
        "run), onnxruntime with all optimisations on. Compared with torch's draws, for every "
        "logit: mean and variance, in standard errors of their difference (the variance's by the "
        "fourth moment); the worst of 40 logits is shown, and 4 is the limit. Written by "
        "`python -m benchmarks.mc_onnx --markdown docs/mc_onnx.md`.",
        "",
        "| run | mean, worst | variance, worst | changes from run to run | verdict | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, agreement, changed, seconds in rows:
        verdict = "agrees" if agreement.ok else "**differs**"
        lines.append(
            f"| {name} | {agreement.mean:.3g} | {agreement.variance:.3g} | "
            f"{'yes' if changed else 'no'} | {verdict} | {seconds:.1f} |"
        )
    made = ", ".join(f"{key} {value}" for key, value in environment().items())
    return "\n".join([*lines, "", SEEDS, "", f"Measured with {made}.", ""])


if __name__ == "__main__":
    main()
