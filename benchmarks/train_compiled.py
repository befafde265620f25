"""A compiled training step with stochastic depth against one of the compiled plain network.

As `benchmarks.train_step`, with every network compiled by `torch.compile(fullgraph=True)`: rounds
of the contenders in turn, each over the plain network's steps right before and after it. The mode
"batch" is not here: where it draws, the graph breaks. The plain network that is not compiled runs
along, to show what compiling alone gives.

    python -m benchmarks.train_compiled [--cases resnet110:64 ...] [--missing] [--rounds 7]
    python -m benchmarks.train_compiled --malloc-as-it-is [...]   memory as the C library manages it

Each case is written to docs/train_step.json when it is done; the page is written by
`python -m benchmarks.train_step --page`. Compiling takes one to three minutes a contender, with
every core; the steps are measured on one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from typing import Any

import torch
from torch import nn

import dropsurgery as ds
from benchmarks.train_networks import NETWORKS, Step, inputs_of, retrofitted
from benchmarks.train_rounds import (
    BOTH_RATES,
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
# The sections of docs/train_step.json.
COMPILED, AS_IT_IS = "compiled", "compiled, malloc as it is"


def compiled(module: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> Step:
    """Return the step of a compiled network."""
    step = Step(module, inputs)
    step.module = torch.compile(module, fullgraph=True)  # type: ignore[assignment]
    return step


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return the ratios of the modes "row" and "subset" of one network and batch size."""
    inputs = inputs_of(name, batch)
    builder = NETWORKS[name][0]
    plain = compiled(builder(), inputs)
    steps = {"not compiled": Step(builder(), inputs)}
    ideals: dict[str, float] = {}
    steps["row 0.5"] = compiled(retrofitted(name, 0.5, "row"), inputs)
    for final in FINAL if batch in BOTH_RATES else FINAL[:1]:
        net = retrofitted(name, final, "subset")
        # Eager code on one thread masks some branches of small batches that compiled code does not.
        torch.set_num_threads(2)
        ideals[f"subset {final}"] = ds.expected_compute(net, inputs[:1]).ratio
        torch.set_num_threads(1)
        steps[f"subset {final}"] = compiled(net, inputs)
    one_round(plain, steps)  # compiles, on every core that there is
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    several_rounds(plain, steps, WARM_UP)
    seconds, ratios = several_rounds(plain, steps, rounds)
    os.sched_setaffinity(0, cores)
    result: dict[str, Any] = {"plain, seconds": statistics.median(seconds), "rounds": rounds}
    for key, found in ratios.items():
        entry = result[key] = figures(found)
        if key in ideals:
            entry |= {"ideal": ideals[key], "against ideal": entry["ratio"] / ideals[key]}
    return result


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=None, metavar="NETWORK:BATCH")
    parser.add_argument("--missing", action="store_true", help="only cases without a result yet")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--malloc-as-it-is", action="store_true", help="let it give memory back")
    options = parser.parse_args()
    if not options.malloc_as_it_is:
        keep_freed()
    section = AS_IT_IS if options.malloc_as_it_is else COMPILED
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for case in options.cases or CASES:
        if options.missing and case in results().get(section, {}):
            continue
        name, batch = case.split(":")
        found = measure(name, int(batch), options.rounds)
        torch._dynamo.reset()
        keep(section, case, found)
        print(case, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
