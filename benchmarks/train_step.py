"""A training step with stochastic depth against one of the plain network, in one run.

Forward, backward and optimiser (SGD with momentum), the modes in turn, round after round. Each
round's times are divided by the plain network's time of that round; medians of these ratios.
Beside each stands the ideal: one minus the share of the forward's floating-point operations that
is saved, in expectation (`ds.expected_compute`), or, for whole mini-batches, that of the branches
that were really dropped. It takes it that time goes by operations. Normalisation, activations and
copies take time and count nothing, more of it in early stages than in late ones. So a second
ideal, "by time", weighs the stages by what their branches were measured to take: the plain step
less one that never runs them. The clock is the processor time of one thread, which other work on
the machine disturbs least.

    python -m benchmarks.train_step [--cases resnet110:64 ...] [--missing] [--rounds 7]
    python -m benchmarks.train_step --memory      peak memory of a step, and what autograd keeps
    python -m benchmarks.train_step --break-even  where "subset" begins to pay, stage by stage
    python -m benchmarks.train_step --by-batch    what a sample costs in smaller batches
    python -m benchmarks.train_compiled           compiled steps
    python -m benchmarks.train_step --page        docs/train_step.md from what was measured

Each case is written to docs/train_step.json when it is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dropsurgery as ds
from benchmarks.train_networks import (
    NETWORKS,
    STAGES,
    Step,
    dinov2,
    inputs_of,
    retrofitted,
    share_run,
    where_of,
    without,
)
from benchmarks.train_rounds import (
    BOTH_RATES,
    FINAL,
    RESULTS,
    figures,
    keep,
    keep_freed,
    one_round,
    results,
    several_rounds,
)
from dropsurgery.graph.module import called_module, graphs

MODES = ("row", "subset", "batch")
CASES = [f"{name}:{batch}" for batch in (64, 16, 128, 32) for name in NETWORKS]
# Whose contenders need more than 20 GiB together, where each keeps its memory.
TIGHT = ("resnet50:128", "convnext_tiny:128", "swin_tiny:128")
WARM_UP = 3


class Bench:
    """The steps of one network and batch size, and what is ideal for each.

    Args:
        name: the network.
        batch: the batch size.
    """

    def __init__(self, name: str, batch: int) -> None:
        inputs = inputs_of(name, batch)
        self.tight = f"{name}:{batch}" in TIGHT
        builder = NETWORKS[name][0]
        self.plain = Step(builder(), inputs)
        self.steps: dict[str, Step] = {}
        self.computes: dict[str, ds.Compute] = {}
        for final in FINAL if batch in BOTH_RATES else FINAL[:1]:
            for mode in MODES:
                key = f"{mode} {final}"
                net = retrofitted(name, final, mode)
                self.steps[key] = Step(net, inputs)
                if mode != "row":  # which computes everything
                    self.computes[key] = ds.expected_compute(net, inputs[:1])
                if mode == "batch":
                    watch(self.steps[key])
        self.steps["DINOv2's subset 0.5"] = Step(dinov2(retrofitted(name, 0.5, "subset")), inputs)
        if name != "resnet110":
            self.steps["timm's drop path 0.5"] = Step(builder(drop_path_rate=0.5), inputs)
        self.sites: dict[str, list[str]] = {}
        for stage in STAGES[name]:
            net = without(name, stage)
            sites = ds.expected_compute(net, inputs[:1]).sites
            self.sites[stage] = [site.path for site in sites if site.mode == "batch"]
            self.steps[f"without {stage}"] = Step(net, inputs, every_parameter=True)

    def round(self) -> tuple[float, dict[str, float]]:
        """Run every step; see `one_round`."""
        return one_round(self.plain, self.steps, self.tight)

    def runs(self, key: str) -> dict[str, float]:
        """Return which share of each site's branch a mode runs, or ran in its last step."""
        if key.startswith("batch"):
            dropped = self.steps[key].dropped
            return {site.path: float(site.path not in dropped) for site in self.computes[key].sites}
        return {site.path: site.run for site in self.computes[key].sites}

    def ideal(self, key: str, runs: dict[str, float]) -> float:
        """Return the share of the forward's operations that is run."""
        return share_run(self.computes[key], runs)

    def ideal_by_time(self, key: str, runs: dict[str, float], shares: dict[str, float]) -> float:
        """Return the same, with the share of the plain step's time that each stage takes."""
        flops = {site.path: site.flops for site in self.computes[key].sites}
        saved = 0.0
        for stage, paths in self.sites.items():
            idle = sum(flops[path] * (1.0 - runs[path]) for path in paths)
            saved += shares[stage] * idle / sum(flops[path] for path in paths)
        return 1.0 - saved

    def shares(self) -> dict[str, float]:
        """Return the share of the forward's operations that the branches of each stage take."""
        compute = next(iter(self.computes.values()))
        flops = {site.path: site.flops for site in compute.sites}
        return {
            stage: sum(flops[path] for path in paths) / compute.total
            for stage, paths in self.sites.items()
        }


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return the ratios of every mode and rate of one network and batch size."""
    bench = Bench(name, batch)
    for _ in range(WARM_UP):  # until the heap has what the largest draws need
        bench.round()
    ratios: dict[str, list[float]] = {}
    runs: dict[str, list[dict[str, float]]] = {key: [] for key in bench.computes}
    plain: list[float] = []
    for _ in range(rounds):
        seconds, of_round = bench.round()
        plain.append(seconds)
        for key, ratio in of_round.items():
            ratios.setdefault(key, []).append(ratio)
        for key, found in runs.items():
            found.append(bench.runs(key))
    shares = {
        stage: 1.0 - statistics.median(ratios.pop(f"without {stage}")) for stage in bench.sites
    }
    result: dict[str, Any] = {
        "plain, seconds": statistics.median(plain),
        "rounds": rounds,
        "stages": {
            stage: {"operations": operations, "time": shares[stage]}
            for stage, operations in bench.shares().items()
        },
    }
    for key, own in ratios.items():
        entry = result[key] = figures(own)
        if key not in runs:
            continue
        expected = {site.path: site.run for site in bench.computes[key].sites}
        entry["ideal"] = bench.ideal(key, expected)
        entry["ideal by time"] = bench.ideal_by_time(key, expected, shares)
        # The cost of "batch" is random: each step against the ideal of what it drew.
        drawn = list(zip(own, runs[key], strict=True))
        entry["against ideal"] = statistics.median([r / bench.ideal(key, run) for r, run in drawn])
        entry["against ideal by time"] = statistics.median(
            [r / bench.ideal_by_time(key, run, shares) for r, run in drawn]
        )
    return result


def watch(step: Step) -> None:
    """Let a step write down the paths of the branches that were dropped."""
    for path, layer in step.module.named_modules():
        if not isinstance(layer, ds.DropPath):
            continue

        def watched(path: str = path, survives: Callable[[], bool] = layer.survives) -> bool:
            kept = survives()
            if not kept:
                step.dropped.add(path)
            return kept

        layer.survives = watched  # type: ignore[method-assign]


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
    before = peak()
    step()
    return peak() - before


def peak() -> int:
    """Return the process's peak resident set in bytes; rusage's starts with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def kept_bytes(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> int:
    """Return how many bytes of activations a training forward keeps for the backward, exactly."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        x = x.detach()  # or an output that its own node keeps would never be let go
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = F.cross_entropy(module.train()(inputs[0]), inputs[1])
    del loss
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def kept(name: str, batch: int, draws: int = 3) -> dict[str, float]:
    """Return what is kept in the modes "row" and "subset" over what the plain network keeps."""
    inputs = inputs_of(name, batch)
    plain = kept_bytes(NETWORKS[name][0](), inputs)
    found: dict[str, float] = {"plain kept, MB": plain / 2**20}
    for mode in ("row", "subset"):
        module = retrofitted(name, 0.5, mode)
        own = [kept_bytes(module, inputs) / plain for _ in range(draws)]
        found[f"{mode} kept"] = statistics.fmean(own)
    return found


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
            x = x.detach()  # see `kept_bytes`
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
    from dropsurgery.graph.lower import pixelwise_within, region_of, working_calls
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
        region = region_of(module, regions, node)
        for member in region.nodes:
            share[member] = layer.run(batch, pixelwise_within(module, region)) / batch
    total = sum(runner.bytes.values())
    return sum(size * share.get(node, 1.0) for node, size in runner.bytes.items()) / total


def memory(cases: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each case and its peaks in every mode as ratios to the plain one's."""
    for case in cases:
        name, batch = case.split(":")
        peaks = {}
        for mode in ("plain", *MODES):
            command = [sys.executable, "-m", "benchmarks.train_step", "--peak", f"{case}:{mode}"]
            peaks[mode] = int(subprocess.check_output(command, text=True))
        yield (
            case,
            {
                "plain, MB": peaks["plain"] / 2**20,
                **{mode: peaks[mode] / peaks["plain"] for mode in MODES},
                **kept(name, int(batch)),
                "ideal subset": ideal_memory(name, int(batch)),
            },
        )


# Break-even

RATES = {"resnet110": (0.05, 0.1, 0.15, 0.2, 0.3), "resnet50": (0.05, 0.1, 0.3, 0.4, 0.5)}
OTHER_RATES = (0.05, 0.1)


def break_even(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return the ratio of "subset" at small constant rates, in the first and the last stage."""
    inputs = inputs_of(name, batch)
    steps, ideals = {}, {}
    for stage in dict.fromkeys((STAGES[name][0], STAGES[name][-1])):
        for rate in RATES.get(name, OTHER_RATES):
            key = f"{stage} {rate}"
            insertion = ds.InsertDropPath(
                ds.survival.constant(1.0 - rate),
                mode="subset",
                where=where_of(name, stage),
                break_even=0.0,
            )
            net = ds.apply(NETWORKS[name][0](), insertion).module
            steps[key] = Step(net, inputs)
            ideals[key] = ds.expected_compute(net, inputs[:1]).ratio
    plain = Step(NETWORKS[name][0](), inputs)
    one_round(plain, steps)
    _, ratios = several_rounds(plain, steps, rounds)
    return {key: {**figures(own), "ideal": ideals[key]} for key, own in ratios.items()}


# Smaller batches

SIZES = (64, 56, 48, 40, 32, 16, 14, 12, 10, 8)


def by_batch(name: str, rounds: int) -> dict[str, float]:
    """Return the plain network's time a sample at each batch size, over that at 64 or at 16."""
    module = NETWORKS[name][0]()
    steps = {size: Step(module, inputs_of(name, size)) for size in SIZES}
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    for turn in range(rounds + 1):
        for size, step in steps.items():
            seconds = step()
            if turn:
                times[size].append(seconds / size)
    whole = {size: 64 if size >= 32 else 16 for size in SIZES}
    middle = {size: statistics.median(own) for size, own in times.items()}
    return {str(size): middle[size] / middle[whole[size]] for size in SIZES}


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=None, metavar="NETWORK:BATCH")
    parser.add_argument("--missing", action="store_true", help="only cases without a result yet")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--break-even", action="store_true")
    parser.add_argument("--by-batch", action="store_true")
    parser.add_argument("--page", action="store_true", help="write docs/train_step.md")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.page or options.memory or options.peak):
        keep_freed()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.peak:
        name, batch, mode = options.peak.split(":")
        print(peak_memory(name, int(batch), mode))
    elif options.memory:
        for case, value in memory(options.cases or [f"{name}:64" for name in NETWORKS]):
            keep("memory", case, value)
            print(case, json.dumps(value), flush=True)
    elif options.break_even:
        for case in options.cases or [f"{name}:64" for name in NETWORKS]:
            name, batch = case.split(":")
            found = break_even(name, int(batch), options.rounds)
            keep("break-even", case, found)
            print(case, json.dumps(found), flush=True)
    elif options.by_batch:
        for name in options.cases or ("resnet110", "resnet50"):
            keep("by batch", name, by_batch(name, options.rounds))
    elif options.page:
        from benchmarks.train_page import write

        write(RESULTS)
    else:
        for case in options.cases or CASES:
            if options.missing and case in results().get("steps", {}):
                continue
            name, batch = case.split(":")
            found = measure(name, int(batch), options.rounds)
            found["peak of the process, GiB"] = peak() / 2**30
            keep("steps", case, found)
            print(case, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
