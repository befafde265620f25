"""A training step with stochastic depth against one of the plain network, in one run.

Forward, backward and optimiser (SGD with momentum), the modes in turn, round after round. Each
round's times are divided by the plain network's time of that round; medians of these ratios.
Beside each stands the ideal: one minus the share of the forward's floating-point operations that
is saved, in expectation (`ds.expected_compute`), or, for whole mini-batches, that of the branches
that were really dropped. The clock is the processor time of one thread, which other work on the
machine disturbs least.

    python -m benchmarks.train_step [--cases resnet110:64 ...] [--rounds 7]
    python -m benchmarks.train_step --memory      peak memory of a step, each in a fresh process
    python -m benchmarks.train_step --break-even  where "subset" begins to pay, stage by stage
    python -m benchmarks.train_step --page        docs/train_step.md from what was measured

Each case is written to docs/train_step.json when it is done.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dropsurgery as ds
from benchmarks.scaling import resnet
from dropsurgery.graph import lower
from dropsurgery.graph.module import called_module, graphs
from dropsurgery.layers.rows import Rows
from dropsurgery.models import import_torchvision

RESULTS = Path("docs/train_step.json")
MODES = ("row", "subset", "batch")
FINAL = (0.5, 0.8)


def vit(**options: Any) -> nn.Module:
    """Return timm's ViT-S/16 for 96 px."""
    return timm_model("vit_small_patch16_224", img_size=96, **options)


def convnext(**options: Any) -> nn.Module:
    """Return timm's ConvNeXt-T."""
    return timm_model("convnext_tiny", **options)


def swin(**options: Any) -> nn.Module:
    """Return timm's Swin-T for 112 px."""
    return timm_model("swin_tiny_patch4_window7_224", img_size=112, **options)


def resnet50(**options: Any) -> nn.Module:
    """Return timm's ResNet-50, the architecture of torchvision's."""
    return timm_model("resnet50", **options)


def timm_model(name: str, **options: Any) -> nn.Module:
    """Return a timm model of ten classes."""
    import_torchvision()
    import timm

    return timm.create_model(name, num_classes=10, **options)


# Name, builder (with the options of timm's own drop path where it has one), image size.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "resnet110": (lambda **_: resnet(110), 32),
    "resnet50": (resnet50, 128),
    "vit_small": (vit, 96),
    "convnext_tiny": (convnext, 96),
    "swin_tiny": (swin, 112),
}
CASES = [f"{name}:{batch}" for batch in (64, 16, 128, 32) for name in NETWORKS]
# At these batch sizes both rates are measured, at the others p_L = 0.5 alone.
BOTH_RATES = (16, 64)


class Step:
    """One network, and what is needed to train it by one step.

    Args:
        module: the network; it is trained in place.
        inputs: images and labels.
    """

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        self.module = module.train()
        self.x, self.y = inputs
        self.optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)
        self.dropped: set[int] = set()

    def __call__(self) -> float:
        """Train by one step; return its processor time in seconds."""
        self.dropped.clear()
        start = time.process_time()
        self.optimizer.zero_grad()
        F.cross_entropy(self.module(self.x), self.y).backward()
        self.optimizer.step()
        return time.process_time() - start


def inputs_of(name: str, batch: int) -> tuple[Tensor, Tensor]:
    """Return random images and labels."""
    size = NETWORKS[name][1]
    return torch.randn(batch, 3, size, size), torch.randint(10, (batch,))


def retrofitted(name: str, final: float, mode: str, **options: Any) -> fx.GraphModule:
    """Return a network with drop path under the paper's rule."""
    model = NETWORKS[name][0]()
    insertion = ds.InsertDropPath(ds.survival.linear(final), mode=mode, **options)  # type: ignore[arg-type]
    return ds.apply(model, insertion).module


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return the ratios of every mode and rate of one network and batch size."""
    inputs = inputs_of(name, batch)
    builder = NETWORKS[name][0]
    steps = {"plain": Step(builder(), inputs)}
    ideals: dict[str, float] = {}
    for final in FINAL if batch in BOTH_RATES else FINAL[:1]:
        for mode in MODES:
            net = retrofitted(name, final, mode)
            key = f"{mode} {final}"
            steps[key] = Step(net, inputs)
            ideals[key] = ds.expected_compute(net, inputs[:1]).ratio
            if mode == "batch":
                watch(steps[key])
    steps["DINOv2's subset 0.5"] = Step(dinov2(retrofitted(name, 0.5, "subset")), inputs)
    if name != "resnet110":
        steps["timm's drop path 0.5"] = Step(builder(drop_path_rate=0.5), inputs)
    flops = branch_flops(steps["batch 0.5"].module, inputs[0])
    times: dict[str, list[float]] = {key: [] for key in steps}
    against_ideal: dict[str, list[float]] = {key: [] for key in steps}
    for turn in range(rounds + 1):
        for key, step in steps.items():
            seconds = step()
            if not turn:
                continue  # the first step allocates
            times[key].append(seconds)
            if key.startswith("batch"):
                saved = sum(flops[site] for site in dropped_sites(step)) / flops[-1]
                against_ideal[key].append(seconds / times["plain"][-1] / (1.0 - saved))
    result: dict[str, Any] = {"plain, seconds": statistics.median(times["plain"])}
    for key, seconds_of in times.items():
        if key == "plain":
            continue
        ratios = [a / b for a, b in zip(seconds_of, times["plain"], strict=True)]
        entry = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        if key in ideals:
            entry["ideal"] = ideals[key]
            own = against_ideal[key] or [ratio / ideals[key] for ratio in ratios]
            entry["against ideal"] = (
                statistics.fmean(own) if against_ideal[key] else (statistics.median(own))
            )
        result[key] = entry
    return result


def branch_flops(module: nn.Module, x: Tensor) -> dict[int, int]:
    """Return the operations of each drop-path site by its place, and of the network as -1."""
    found = ds.expected_compute(module, (x,))
    return {**{i: site.flops for i, site in enumerate(found.sites)}, -1: found.total}


def watch(step: Step) -> None:
    """Let a step write down which of its branches were dropped."""
    layers = [m for m in step.module.modules() if isinstance(m, ds.DropPath)]
    for place, layer in enumerate(layers):
        survives = layer.survives

        def watched(place: int = place, survives: Callable[[], bool] = survives) -> bool:
            kept = survives()
            if not kept:
                step.dropped.add(place)
            return kept

        layer.survives = watched  # type: ignore[method-assign]


def dropped_sites(step: Step) -> set[int]:
    """Return the places, in the order of the calls, of the branches that a step dropped."""
    module = step.module
    assert isinstance(module, fx.GraphModule)
    layers = [m for m in module.modules() if isinstance(m, ds.DropPath)]
    called = [called_module(module, node) for node in graphs(module)[-1].nodes]
    order = [layer for layer in called if isinstance(layer, ds.DropPath)]
    return {order.index(layers[place]) for place in step.dropped}


# DINOv2's way, as its block.py describes it: int(B·p) samples, gathered by indexing and added by
# index_add on flattened rows, above a drop probability of 0.1 only.


def dinov2(module: fx.GraphModule) -> fx.GraphModule:
    """Return a module with "subset" whose rows are drawn and added in DINOv2's way."""
    for layer in module.modules():
        if isinstance(layer, ds.DropPath):
            layer.rows = lambda x, axis=0, layer=layer: dinov2_rows(layer, x)  # type: ignore
            layer.mode = "subset"
    names = {"take_rows": dinov2_take, "add_rows": dinov2_add}
    previous = {name: getattr(lower, name) for name in names}
    for name, function in names.items():
        setattr(lower, name, function)
    module.recompile()
    for name, function in previous.items():
        setattr(lower, name, function)
    return module


def dinov2_rows(layer: ds.DropPath, x: Tensor) -> Rows | None:
    """Draw int(B·p) samples, scaled by B over that."""
    batch = x.shape[0]
    if not layer.training or layer.drop_prob <= 0.1:
        return None
    count = max(int(batch * (1 - layer.drop_prob)), 1)
    return Rows(torch.randperm(batch)[:count], None, None, batch / count)


def dinov2_take(x: Tensor, rows: Rows | None, axis: int = 0) -> Tensor:
    """Gather by indexing."""
    return x if rows is None else x[rows.index]


def dinov2_add(
    skip: Tensor, branch: Tensor, rows: Rows | None, axis: int = 0, in_place: bool = False
) -> Tensor:
    """Add flattened rows."""
    if rows is None:
        return skip + branch
    assert rows.index is not None
    total = torch.index_add(
        skip.flatten(1), 0, rows.index, branch.flatten(1).to(skip.dtype), alpha=rows.scale
    )
    return total.view_as(skip)


# Memory


def peak_memory(name: str, batch: int, mode: str) -> int:
    """Return by how many bytes a training step raises the peak of this process."""
    inputs = inputs_of(name, batch)
    if mode == "plain":
        module: nn.Module = NETWORKS[name][0]()
    else:
        module = retrofitted(name, 0.5, mode)
    step = Step(module, inputs)
    warm = Step(NETWORKS[name][0](), inputs_of(name, 2))
    warm()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return after - before


class Saved(fx.Interpreter):
    """Runs a graph and writes down how many bytes each node saves for the backward."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, graph=graphs(module)[-1])
        self.bytes: dict[fx.Node, int] = {}
        self.seen: set[int] = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.kept: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and count what autograd keeps of it."""

        def pack(x: Tensor) -> Tensor:
            pointer = x.untyped_storage().data_ptr()
            if pointer not in self.seen:
                self.seen.add(pointer)
                self.kept.append(x)
                self.bytes[n] = self.bytes.get(n, 0) + x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return super().run_node(n)


def ideal_memory(name: str, batch: int) -> float:
    """Return the share of what is saved for the backward that "subset" at 0.5 needs at least."""
    from dropsurgery.graph.lower import region_of, working_calls
    from dropsurgery.graph.region import Regions

    module = retrofitted(name, 0.5, "subset").train()
    graph = graphs(module)[-1]
    runner = Saved(module)
    for layer in module.modules():
        if isinstance(layer, ds.DropPath):
            layer.training = False  # everything is computed: what is kept of a branch is counted
    runner.run(inputs_of(name, batch)[0])
    regions = Regions(module, graph)
    share: dict[fx.Node, float] = {}
    for node in working_calls(module, graph):
        layer = called_module(module, node)
        assert isinstance(layer, ds.DropPath)
        for member in region_of(module, regions, node).nodes:
            share[member] = layer.count(batch) / batch
    total = sum(runner.bytes.values())
    return sum(size * share.get(node, 1.0) for node, size in runner.bytes.items()) / total


def memory(batch: int = 64) -> dict[str, Any]:
    """Return the peaks of every network and mode as ratios to the plain network's."""
    found: dict[str, Any] = {}
    for name in NETWORKS:
        peaks = {}
        for mode in ("plain", *MODES):
            command = [
                sys.executable,
                "-m",
                "benchmarks.train_step",
                "--peak",
                f"{name}:{batch}:{mode}",
            ]
            peaks[mode] = int(subprocess.check_output(command, text=True))
        found[name] = {
            "plain, MB": peaks["plain"] / 2**20,
            **{mode: peaks[mode] / peaks["plain"] for mode in MODES},
            "ideal subset": ideal_memory(name, batch),
        }
        print(name, found[name], flush=True)
    return found


# Break-even

RATES = (0.02, 0.05, 0.1, 0.2)
STAGES = {
    "resnet110": ("stage 1", "stage 2", "stage 3"),
    "resnet50": ("layer1*", "layer2*", "layer3*", "layer4*"),
    "vit_small": ("blocks*",),
    "convnext_tiny": ("stages.0*", "stages.1*", "stages.2*", "stages.3*"),
    "swin_tiny": ("layers.0*", "layers.1*", "layers.2*", "layers.3*"),
}


def where_of(name: str, stage: str) -> Any:
    """Return the choice of the sites of a stage."""
    if name != "resnet110":
        return stage
    first = 18 * (int(stage[-1]) - 1)
    return lambda site: first < site.block <= first + 18


def break_even(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return the ratio of "subset" at small constant rates, one stage at a time."""
    inputs = inputs_of(name, batch)
    found: dict[str, Any] = {}
    for stage in STAGES[name]:
        steps = {"plain": Step(NETWORKS[name][0](), inputs)}
        ideal = {}
        for rate in RATES:
            insertion = ds.InsertDropPath(
                ds.survival.constant(1.0 - rate),
                mode="subset",
                where=where_of(name, stage),
                break_even=0.0,
            )
            net = ds.apply(NETWORKS[name][0](), insertion).module
            steps[str(rate)] = Step(net, inputs)
            ideal[str(rate)] = ds.expected_compute(net, inputs[:1]).ratio
        times: dict[str, list[float]] = {key: [] for key in steps}
        for turn in range(rounds + 1):
            for key, step in steps.items():
                seconds = step()
                if turn:
                    times[key].append(seconds)
        for key in ideal:
            ratios = [a / b for a, b in zip(times[key], times["plain"], strict=True)]
            found[f"{stage} {key}"] = {"ratio": statistics.median(ratios), "ideal": ideal[key]}
        print(name, stage, {k: v for k, v in found.items() if k.startswith(stage)}, flush=True)
    return found


# Results


def keep(section: str, key: str, value: Any) -> None:
    """Write one result into the file of results."""
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document.setdefault(section, {})[key] = value
    document["about"] = (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        "one thread, float32"
    )
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=None, metavar="NETWORK:BATCH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--break-even", action="store_true")
    parser.add_argument("--page", action="store_true", help="write docs/train_step.md")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.peak:
        name, batch, mode = options.peak.split(":")
        print(peak_memory(name, int(batch), mode))
    elif options.memory:
        for name, value in memory().items():
            keep("memory", name, value)
    elif options.break_even:
        for name in NETWORKS:
            keep("break-even", name, break_even(name, 64, options.rounds))
    elif options.page:
        from benchmarks.train_page import write

        write(RESULTS)
    else:
        for case in options.cases or CASES:
            name, batch = case.split(":")
            found = measure(name, int(batch), options.rounds)
            keep("steps", case, found)
            print(case, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
