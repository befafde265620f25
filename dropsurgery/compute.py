"""What stochastic depth computes and what it saves, in floating-point operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dropsurgery.errors import ArgumentError
from dropsurgery.graph.drops import is_drop_path, rate
from dropsurgery.graph.lower import pixelwise_within, region_of, working_calls
from dropsurgery.graph.module import called_module, graphs, module_path
from dropsurgery.graph.region import NoRegion, Region, Regions
from dropsurgery.graph.shapes import PlainArguments, with_fake_buffers
from dropsurgery.graph.trace import arguments, trace
from dropsurgery.layers.drop_path import DropPath
from dropsurgery.tables import render


@dataclass(frozen=True)
class SiteCompute:
    """One drop-path call and the branch behind it.

    Attributes:
        path: dotted path of the drop-path layer.
        module: dotted path of the module whose forward holds the branch.
        mode: how it drops: "row", "subset" or "batch".
        survival: its survival probability, in [0, 1].
        flops: floating-point operations of the branch, forward, for all samples.
        run: which share of them is run in expectation, in [0, 1].
        reason: why all of them are run although the mode could save some; "" otherwise.
    """

    path: str
    module: str
    mode: str
    survival: float
    flops: int
    run: float
    reason: str = ""


@dataclass(frozen=True)
class Compute:
    """What `expected_compute` returns; `str()` draws it as a table.

    Attributes:
        sites: the drop-path calls, in the order in which they run.
        total: floating-point operations of one forward of the whole network with nothing dropped.
        expected: those of a training forward in expectation.
        batch: the batch size that this holds for.
    """

    sites: tuple[SiteCompute, ...]
    total: int
    expected: float
    batch: int

    @property
    def ratio(self) -> float:
        """Expected over total, in (0, 1]: the best that training time can come to."""
        return self.expected / self.total if self.total else 1.0

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 100) -> str:
        """Return the table and a line about the whole network, for a console of some width."""
        rows = [
            (
                site.path,
                site.mode,
                f"{site.survival:.4g}",
                f"{site.flops / 1e6:,.1f}",
                f"{site.run:.1%}",
                site.reason,
            )
            for site in self.sites
        ]
        table = render(
            ("drop path", "mode", "survival", "branch MFLOP", "run", ""),
            rows,
            title=f"{len(rows)} branches, batch {self.batch}",
            width=width,
        )
        return (
            f"{table}\n\nforward: {self.total / 1e9:,.3f} GFLOP, in expectation "
            f"{self.expected / 1e9:,.3f} when training ({1 - self.ratio:.1%} saved)"
        )


def expected_compute(module: nn.Module, example_inputs: Any) -> Compute:
    """Count what the branches of a network cost, and what dropping them saves in expectation.

    A multiplication and an addition are two operations, counted by torch's own counter (matrix
    products, convolutions and attention). "row" saves nothing: it masks. "subset" runs a branch of
    survival p for B·p of B samples (one at least), "batch" for all of them with probability p. The
    backward of these operations costs twice the forward and is saved in the same share.

    Args:
        module: a module that dropsurgery returned (or any other: nothing is dropped then). It is
            not changed; nothing is computed, and no memory is taken for weights or activations.
        example_inputs: positional inputs, on the network's device; the batch is on axis 0 of the
            first tensor.

    Raises:
        ArgumentError: there is no tensor among the inputs.
        TraceError: the network cannot be turned into a graph, or the inputs do not fit it.
    """
    traced = trace(module, example_inputs=example_inputs)
    inputs = arguments(traced, example_inputs)
    batch = next((v.shape[0] for v in inputs if isinstance(v, Tensor) and v.ndim), 0)
    if not batch:
        raise ArgumentError("expected_compute needs an input tensor with a batch axis")
    on_cpu = all(v.device.type == "cpu" for v in inputs if isinstance(v, Tensor))
    graph = graphs(traced)[-1]
    costs = flops_by_node(traced, graph, inputs)
    regions = Regions(traced, graph)
    working = set(working_calls(traced, graph))
    shares: dict[fx.Node, float] = {}
    sites = []
    for node in graph.nodes:
        layer = called_module(traced, node)
        if layer is None or not is_drop_path(layer):
            continue
        region, reason = _region(traced, regions, node)
        run = 1.0
        if node not in working:
            reason = ""  # it masks, as it was asked to
        elif region is not None:
            pixelwise = on_cpu and pixelwise_within(traced, region)
            run, reason = _share(layer, batch, pixelwise)
        members = region.nodes if region else ()
        for member in members:
            shares[member] = shares.get(member, 1.0) * run
        flops = sum(costs.get(member, 0) for member in members)
        sites.append(
            SiteCompute(
                path=str(node.target),
                module=module_path(node),
                mode=getattr(layer, "mode", "row"),
                survival=1.0 - rate(layer),
                flops=flops,
                run=run,
                reason=reason,
            )
        )
    expected = sum(cost * shares.get(node, 1.0) for node, cost in costs.items())
    return Compute(tuple(sites), sum(costs.values()), expected, batch)


def _region(module: fx.GraphModule, regions: Regions, node: fx.Node) -> tuple[Region | None, str]:
    try:
        return region_of(module, regions, node), ""
    except NoRegion as error:
        return None, str(error)


def _share(layer: nn.Module, batch: int, pixelwise: bool) -> tuple[float, str]:
    """Return which share of a branch runs in expectation, and the reason if it is all of it."""
    assert isinstance(layer, DropPath)
    keep = 1.0 - layer.drop_prob
    if layer.mode == "batch":
        return keep, ""
    run = layer.run(batch, pixelwise)
    if run == batch and layer.drop_prob > 0.0:
        below = layer.below_break_even(batch, pixelwise)
        reason = "below the break-even" if below else f"ceil({batch} · {keep:.4g}) is all of them"
        return 1.0, f"masked: {reason}"
    return run / batch, ""


class _Counter(PlainArguments):
    """Runs a graph on fake tensors, and writes down what each node costs."""

    def __init__(self, module: nn.Module, graph: fx.Graph, counter: FlopCounterMode) -> None:
        super().__init__(module, graph=graph)
        self.counter = counter
        self.costs: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and count it."""
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        if cost := self.counter.get_total_flops() - before:
            self.costs[n] = cost
        return result


def flops_by_node(
    module: fx.GraphModule, graph: fx.Graph, inputs: Sequence[Any]
) -> dict[fx.Node, int]:
    """Return the floating-point operations of each node that has any."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in inputs]
    counter = FlopCounterMode(display=False)
    runner = _Counter(with_fake_buffers(module, mode), graph, counter)
    with torch.no_grad(), mode, counter:
        runner.run(*fake)
    return runner.costs
