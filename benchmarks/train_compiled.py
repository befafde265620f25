"""A compiled training step with stochastic depth against one of the compiled plain network.

As `benchmarks.train_step`, with every network compiled by `torch.compile(fullgraph=True)`: rounds
of the contenders in turn, each over the plain network's steps right before and after it. The mode
"batch" is not here: where it draws, the graph breaks. The plain network that is not compiled runs
along, to show what compiling alone gives.

    python -m benchmarks.train_compiled [--cases resnet110:64 ...] [--missing] [--rounds 4]
    python -m benchmarks.train_compiled --malloc-as-it-is [...]   memory as the C library manages it

Where memory lies differs from process to process, and with it what a step takes, by one to two per
cent: each case is measured in several, and the medians are over the rounds of all of them. The
first one compiles, one to three minutes a contender, with every core; the others find its code in
the compiler's cache. The steps are measured on one core.

Each case is written to docs/train_step.json when it is done; the page is written by
`python -m benchmarks.train_step --page`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import warnings
from typing import Any

import torch
from torch import nn

import dropsurgery as ds
from benchmarks.train_networks import NETWORKS, Step, inputs_of, retrofitted, share_run
from benchmarks.train_rounds import (
    AS_IT_IS,
    BOTH_RATES,
    COMPILED,
    FINAL,
    figures,
    keep,
    keep_freed,
    one_round,
    results,
    several_rounds,
)

CASES = [f"{name}:{batch}" for batch in (64, 16, 128) for name in NETWORKS]
WARM_UP = 2


def compiled(module: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> Step:
    """Return the step of a compiled network."""
    step = Step(module, inputs)
    step.module = torch.compile(module, fullgraph=True)  # type: ignore[assignment]
    return step


def ideal_of(net: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Return the share of operations that is run in expectation, and what compiled code runs."""
    compute = ds.expected_compute(net, inputs[:1])
    runs = {}
    for site in compute.sites:
        layer = net.get_submodule(site.path)
        assert isinstance(layer, ds.DropPath)
        masked = site.run == 1.0
        runs[site.path] = 1.0 if masked else layer.count(compute.batch) / compute.batch
    return compute.ratio, share_run(compute, runs)


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return what one process measures of the modes "row" and "subset", round by round."""
    inputs = inputs_of(name, batch)
    builder = NETWORKS[name][0]
    plain = compiled(builder(), inputs)
    steps = {"not compiled": Step(builder(), inputs)}
    ideals: dict[str, tuple[float, float]] = {}
    steps["row 0.5"] = compiled(retrofitted(name, 0.5, "row"), inputs)
    for final in FINAL if batch in BOTH_RATES else FINAL[:1]:
        net = retrofitted(name, final, "subset")
        ideals[f"subset {final}"] = ideal_of(net, inputs)
        steps[f"subset {final}"] = compiled(net, inputs)
    one_round(plain, steps)  # compiles, on every core that there is
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    several_rounds(plain, steps, WARM_UP)
    seconds, ratios = several_rounds(plain, steps, rounds)
    return {"seconds": seconds, "ratios": ratios, "ideals": ideals}


def pooled(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over the rounds of several processes."""
    seconds = [value for own in found for value in own["seconds"]]
    result: dict[str, Any] = {
        "plain, seconds": statistics.median(seconds),
        "rounds": len(seconds),
        "processes": len(found),
    }
    for key in found[0]["ratios"]:
        entry = result[key] = figures([ratio for own in found for ratio in own["ratios"][key]])
        entry["of each process"] = [statistics.median(own["ratios"][key]) for own in found]
        if key in found[0]["ideals"]:
            ideal, computed = found[0]["ideals"][key]
            entry |= {"ideal": ideal, "against ideal": entry["ratio"] / ideal}
            entry |= {"computed": computed, "against computed": entry["ratio"] / computed}
    return result


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=None, metavar="NETWORK:BATCH")
    parser.add_argument("--missing", action="store_true", help="only cases without a result yet")
    parser.add_argument("--rounds", type=int, default=4, help="of each process")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--malloc-as-it-is", action="store_true", help="let it give memory back")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.malloc_as_it_is:
        keep_freed()
    if options.one:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        name, batch = options.one.split(":")
        print(json.dumps(measure(name, int(batch), options.rounds)))
        return
    section = AS_IT_IS if options.malloc_as_it_is else COMPILED
    own = [sys.executable, "-m", "benchmarks.train_compiled", "--rounds", str(options.rounds)]
    own += ["--malloc-as-it-is"] * options.malloc_as_it_is
    for case in options.cases or CASES:
        if options.missing and case in results().get(section, {}):
            continue
        command = [*own, "--one", case]
        printed = [subprocess.check_output(command, text=True) for _ in range(options.processes)]
        found = pooled([json.loads(one.splitlines()[-1]) for one in printed])
        keep(section, case, found)
        print(case, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
