"""FoldAffine on many random graphs: error, nodes, and that nothing crashes.

    python -m benchmarks.random_graphs --count 5000 --seed 0 [--output docs/random_graphs.md]

Prints one line at the end; a graph that fails is shrunk to a small one and raised.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from dropsurgery.graph.trace import trace
from dropsurgery.passes.base import apply
from dropsurgery.passes.fold_affine import FoldAffine
from tests.fold_helpers import norms_left, relative
from tests.random_affine import CHANNELS, SIDE, RandomGraph, Step, graphs, randomized

PAGE = """\
# Random graphs

`python -m benchmarks.random_graphs --count {count} --seed {seed}`, with torch {torch}.

Hypothesis draws graphs of linear and nonlinear operations (`tests/random_affine.py`): convolutions,
BatchNorms and other norms, stored tensors, products, activations, pooling, views, concatenations
and sums, with forks and shared layers, random weights and statistics, negative and zero gains, with
and without known shapes. `FoldAffine` is held to three things on each: a relative float64 error of
at most 1e-12, never more nodes than before, and no exception.

{line}.
"""


def check(steps: tuple[Step, ...], number: int, shapes: bool, seen: Counter[str]) -> float:
    """Fold one graph and return its error; raise where it is too large, or nodes were added."""
    model = randomized(RandomGraph(steps, number), number)
    x = torch.randn(2, CHANNELS, SIDE, SIDE, dtype=torch.float64)
    traced = trace(model, example_inputs=(x,) if shapes else None)
    result = apply(traced, FoldAffine())
    with torch.no_grad():
        error = relative(result.module(x.clone()), model(x.clone()))
    nodes = len(traced.graph.nodes), len(result.module.graph.nodes)
    assert error <= 1e-12, error
    assert nodes[1] <= nodes[0], nodes
    seen["graphs"] += 1
    seen["nodes before"] += nodes[0]
    seen["nodes after"] += nodes[1]
    seen["BatchNorms before"] += norms_left(traced)
    seen["BatchNorms after"] += norms_left(result.module)
    return error


def main() -> None:
    """Run as many graphs as are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a page, too")
    options = parser.parse_args()
    seen: Counter[str] = Counter()
    largest = [0.0]

    @seed(options.seed)
    @settings(max_examples=options.count, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(graphs(), st.integers(0, 2**16), st.booleans())
    def run(steps: tuple[Step, ...], number: int, shapes: bool) -> None:
        largest[0] = max(largest[0], check(steps, number, shapes, seen))

    run()
    counts = ", ".join(f"{count} {what}" for what, count in seen.items())
    line = f"{counts}; largest relative float64 error {largest[0]:.1e}"
    print(line)
    if options.output is not None:
        options.output.write_text(PAGE.format(**vars(options), line=line, torch=torch.__version__))


if __name__ == "__main__":
    main()
