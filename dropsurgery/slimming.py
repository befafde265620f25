"""What slimming a network brings: counts before and after, and what is left and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from dropsurgery.compute import flops_by_node
from dropsurgery.graph.affine import norm_nodes
from dropsurgery.graph.module import Skip, module_path
from dropsurgery.graph.shapes import PlainArguments, with_fake_buffers
from dropsurgery.graph.trace import arguments
from dropsurgery.passes.base import apply
from dropsurgery.passes.inference import KeepEval
from dropsurgery.report import skips_text
from dropsurgery.surgery import slimmed
from dropsurgery.tables import render


@dataclass(frozen=True)
class Size:
    """How large the inference graph of a network is, and what one run of it costs.

    Attributes:
        nodes: operations, without inputs, outputs and reads of parameters.
        batch_norms: calls of a BatchNorm, as module or function.
        parameters: numbers in parameters and floating-point buffers that the graph can reach.
        flops: floating-point operations for the example inputs, by torch's own counter: a
            multiplication and an addition are two; matrix products, convolutions and attention.
        traffic: bytes that the operations read and write, each by itself, parameters included;
            views count nothing. What a compiler that fuses operations saves is not in it.
    """

    nodes: int
    batch_norms: int
    parameters: int
    flops: int
    traffic: int


@dataclass(frozen=True)
class SlimReport:
    """What `slim_report` returns.

    Attributes:
        before: the network in eval mode, as it is.
        after: what `slim` makes of it.
        changes: how many changes each pass made.
        left: the BatchNorms that are left, and why each is.
    """

    before: Size
    after: Size
    changes: dict[str, int]
    left: tuple[Skip, ...]

    def text(self, width: int = 100, *, title: str = "", every: bool = False) -> str:
        """Return the report for a terminal of `width` columns; `every` lists each BatchNorm."""
        before, after = asdict(self.before), asdict(self.after)
        rows = [
            (
                label,
                _told(key, before[key]),
                _told(key, after[key]),
                _ratio(before[key], after[key]),
            )
            for key, label in _LABELS.items()
        ]
        made = ", ".join(f"{name} {count}" for name, count in self.changes.items())
        parts = [
            render(
                ("", "before", "after", "ratio"), rows, title=title or None, width=width,
                caption=f"changes: {made}" if made else None,
            )
        ]  # fmt: skip
        if self.left:
            count = len(self.left)
            told = f"{count} BatchNorm{'s' * (count > 1)} left"
            parts.append(skips_text(self.left, width, title=told, every=every))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.text()

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; a module of "" is the root."""
        left = [{"module": s.module, "node": s.node, "reason": s.reason} for s in self.left]
        return {
            "before": asdict(self.before),
            "after": asdict(self.after),
            "changes": self.changes,
            "batch_norms_left": left,
        }


_LABELS = {
    "nodes": "nodes",
    "batch_norms": "BatchNorms",
    "parameters": "parameters",
    "flops": "FLOPs",
    "traffic": "memory traffic",
}


def slim_report(model: nn.Module, example_inputs: Any) -> SlimReport:
    """Slim a network and count what that brings.

    Args:
        model: any `nn.Module`, or a GraphModule that dropsurgery returned. It is not changed.
        example_inputs: positional inputs, on the network's device. FLOPs and memory traffic are
            for their sizes; their values matter to a network in half precision alone, which `slim`
            runs on them.

    Raises:
        TraceError: the network cannot be turned into a graph, or the inputs do not fit it.
    """
    before = apply(model, KeepEval(), example_inputs=example_inputs).module
    result = slimmed(model, example_inputs=example_inputs)
    reasons = {skip.node: skip for skip in result.skipped}
    left = []
    for node in norm_nodes(result.module):
        skip = reasons.get(node.name)
        left.append(skip or Skip(module_path(node), node.name, "no pass says why"))
    counts = Counter(change.by for change in result.changes)
    return SlimReport(
        _size(before, arguments(before, example_inputs)),
        _size(result.module, arguments(result.module, example_inputs)),
        dict(counts),
        tuple(left),
    )


def _size(module: fx.GraphModule, inputs: Sequence[Any]) -> Size:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in inputs]
    meter = _Traffic(with_fake_buffers(module, mode), graph=module.graph)
    with torch.no_grad(), mode:
        meter.run(*fake)
    return Size(
        nodes=sum(node.op.startswith("call_") for node in module.graph.nodes),
        batch_norms=len(norm_nodes(module)),
        parameters=sum(t.numel() for t in tensors.values() if t.is_floating_point()),
        flops=sum(flops_by_node(module, module.graph, inputs).values()),
        traffic=meter.total,
    )


class _Traffic(PlainArguments):
    """Runs a graph on fake tensors, and adds up what its operations read and write."""

    total = 0

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and count its bytes."""
        result = super().run_node(n)
        if n.op.startswith("call_"):
            args = self.fetch_args_kwargs_from_env(n)
            read = {id(t): t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)}
            if n.op == "call_module":
                own = self.fetch_attr(str(n.target))
                read |= {id(t): t for t in (*own.parameters(), *own.buffers())}
            stores = {t.untyped_storage()._cdata for t in read.values()}
            written = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
            fresh = [t for t in written if t.untyped_storage()._cdata not in stores]
            if fresh:
                self.total += sum(t.nbytes for t in (*read.values(), *fresh))
        return result


def _told(key: str, value: int) -> str:
    if key in ("nodes", "batch_norms"):
        return str(value)
    unit = "B" if key == "traffic" else ""
    for factor, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value} {unit}".strip()


def _ratio(before: int, after: int) -> str:
    return f"{after / before:.3f}" if before else "-"
