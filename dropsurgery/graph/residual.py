"""Residual sites: which adds join a branch to a skip, and why each other add does not.

An add of two data tensors u + v is a residual site when there is a node f, the *fork*, such that

- one operand, the skip, comes from f through nothing but views, slices, pooling, normalisation and
  affine projections (convolution, linear, BatchNorm), and
- the other, the branch, is computed from f (and whatever else: masks, memory, position tables)
  through at least one operation that is not affine.

Four things look like that and are none, or none by default:

- both operands are affine in f: a linear multi-branch (RepVGG, convolutional position encoding);
- the branch itself holds residual sites: a long skip around blocks (U-Net), "nested";
- the branch is the fork times something, x + x·g(x): a gate;
- the branch is attention weights times values before their projection: a term inside attention.

The skip of an add that is a site is followed through it, so that x + attention(x) + mlp(x) is two
sites on one stream.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from dropsurgery.errors import ArgumentError
from dropsurgery.graph.batch import BatchAxis, batch_axes_of
from dropsurgery.graph.channels import traced_shape
from dropsurgery.graph.drops import is_drop_path
from dropsurgery.graph.forks import Flow, Fork
from dropsurgery.graph.leaves import has_hooks, is_timm_whole
from dropsurgery.graph.module import Skip, called_module, graphs, module_path, owner_call
from dropsurgery.graph.ops import Kind, Role, is_fused_add
from dropsurgery.graph.trace import trace
from dropsurgery.tables import render

# What `include` may ask for.
OPTIONAL = ("linear", "nested")


@dataclass(frozen=True)
class Site:
    """One residual add.

    Attributes:
        block: depth index l of its block, from 1; the adds of one block share it.
        module: dotted path of the module whose forward holds the add ("" is the root).
        add: name of the add's fx node.
        branch: name of the node that the add reads on the branch side.
        skip: name of the node that the add reads on the skip side.
        kind: "identity" where the skip is the fork itself or a view of it, "projection" where it is
            computed from it, "nested" where the branch itself holds residual sites.
        fork: name of the node that branch and skip both come from.
        native: name of the drop-path call that the network already has on this branch, or None.
        call: which call of `module` it is: equals `module` but for modules that are called again.
        linear: the branch is affine in the fork; found only where asked for.
        batch_axis: the axis of the branch that carries the batch; 0 too where that is not proved,
            None where no axis is exactly the batch. See `dropsurgery.graph.batch`.
    """

    block: int
    module: str
    add: str
    branch: str
    skip: str
    kind: Literal["identity", "projection", "nested"]
    fork: str
    native: str | None = None
    call: str = ""
    linear: bool = False
    batch_axis: int | None = 0


@dataclass(frozen=True)
class Residuals:
    """What `find_residuals` returns; `str()` draws it as two tables.

    Attributes:
        sites: the residual adds, in the order in which they run.
        skipped: every other add of tensors, and why it is none; and layers that are kept whole and
            may hide residual adds.
        positions: for each residual block, its place among all blocks, with residual or not.
        places: how many blocks there are, with residual or not.
    """

    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]
    positions: dict[int, int] = field(default_factory=dict, repr=False)
    places: int = 0

    @property
    def blocks(self) -> int:
        """L, the number of residual blocks."""
        return max((site.block for site in self.sites), default=0)

    def __str__(self) -> str:
        sites = render(
            ("block", "module", "kind", "add", "branch", "skip"),
            [(s.block, s.module, s.kind, s.add, s.branch, s.skip) for s in self.sites],
            title=f"{len(self.sites)} residual sites in {self.blocks} blocks",
        )
        if not self.skipped:
            return sites
        skipped = render(
            ("module", "node", "reason"),
            [(s.module, s.node, s.reason) for s in self.skipped],
            title=f"{len(self.skipped)} adds that are none",
        )
        return f"{sites}\n\n{skipped}"


def find_residuals(model: nn.Module, *, include: Collection[str] = ()) -> Residuals:
    """Find the residual adds of a network, and say of every other add of tensors why it is none.

    The analysis reads dataflow, not names. Nothing is run and `model` is not changed.

    Args:
        model: any `nn.Module`, or a GraphModule that dropsurgery returned.
        include: what else counts as a site: "linear" for adds of an affine branch to an identity
            (PoolFormer's; with a BatchNorm on it, MobileOne's), "nested" for long skips around
            other residual sites.

    Returns:
        The sites and the skipped adds. Of a network with two graphs (one for training) the eval
        graph is reported; node names are those of `ds.trace(model).graph`.

    Raises:
        ArgumentError: `include` names something else.
        TraceError: the network cannot be turned into a graph.
    """
    module = model if isinstance(model, fx.GraphModule) else trace(model)
    return analyse(module, graphs(module)[0], check_include(include))


def check_include(include: Collection[str]) -> tuple[str, ...]:
    """Return `include` as a sorted tuple, or raise where it names nothing there is."""
    names = {include} if isinstance(include, str) else set(include)
    if unknown := sorted(names - set(OPTIONAL)):
        raise ArgumentError(
            f"include names {unknown[0]!r}", fix=" and/or ".join(map(repr, OPTIONAL))
        )
    return tuple(sorted(names))


def analyse(module: fx.GraphModule, graph: fx.Graph, include: Collection[str] = ()) -> Residuals:
    """Find the residual adds of one graph of a traced module."""
    return _Analysis(module, graph, include).run()


_OPAQUE = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
           nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # fmt: skip


class _Analysis:
    """The walk over the adds of one graph. Reads; never changes it."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, include: Collection[str]) -> None:
        self.module = module
        self.graph = graph
        self.include = include
        self.flow = Flow(module, graph)
        self.gated = self.flow.gated()
        # Adds around which a longer skip is nested; linear ones are no blocks.
        self.blocks: set[fx.Node] = set()

    def run(self) -> Residuals:
        sites: list[tuple[fx.Node, Fork, bool]] = []
        skipped: list[Skip] = []
        for node in self.flow.nodes:
            reason = ""
            if node.op == "call_module":
                reason = self._hidden(node)
            elif is_fused_add(node) and len(self.flow.data(node)) > 1:
                reason = f"'{node.name}' adds and multiplies in one call: nothing fits between"
            elif self.flow.kind(node) is Kind.ADD and self.flow.roles[node] is not Role.SCALAR:
                fork, reason = self._classify(node)
                if fork is not None:
                    sites.append((node, fork, any(n in self.blocks for n in fork.region)))
            if reason:
                skipped.append(Skip(module_path(node), node.name, reason))
            elif sites and sites[-1][0] is node and not sites[-1][1].linear:
                self.blocks.add(node)
        numbered = self._number(sites)
        positions, places = self._positions(sites, numbered)
        return Residuals(numbered, tuple(skipped), positions, places)

    def _classify(self, add: fx.Node) -> tuple[Fork | None, str]:
        """Return the fork that makes `add` a site, or the reason why none does."""
        flow = self.flow
        operands = flow.data(add)
        if not operands:
            return None, "constant: no operand depends on the network's input"
        if len(operands) == 1:
            if sum(value is operands[0] for value in (*add.args, *add.kwargs.values())) > 1:
                return None, "adds a tensor to itself"
            others = [v for v in add.all_input_nodes if flow.roles[v] is Role.CONSTANT]
            what = f"the constant '{others[0].name}'" if others else "a number"
            return None, f"adds {what}, not a branch"
        left, right = operands[0], operands[1]
        number = next((value for value in (left, right) if flow.is_number(value)), None)
        if number is not None:
            return None, f"'{number.name}' is one number, reduced over all axes"
        forks = [f for f in (flow.fork(left, right), flow.fork(right, left)) if f is not None]
        if not forks:
            return None, "neither operand is a skip: no common fork behind views and projections"
        best = max(forks, key=lambda f: (not f.linear, flow.index[f.node], f.identity, f.light))
        if best.linear:
            flow.streams[add] = best.skip
            if "linear" in self.include and best.light:
                return best, ""
            return None, f"linear branch: '{best.branch.name}' is affine in '{best.node.name}'"
        if flow.is_gate(best):
            return None, f"gate: the branch is '{best.node.name}' times a function of it"
        if flow.is_attention_product(best.branch):
            return None, f"inside attention: '{best.branch.name}' is weights times values"
        if flow.is_sibling_product(best):
            return None, f"inside attention: '{best.node.name}' is the queries, and attends to keys"
        if add in self.gated:
            return None, "in a gate: the sum only scales other values"
        flow.streams[add] = best.skip
        inner = next((n.name for n in best.region if n in self.blocks), None)
        if inner is not None and "nested" not in self.include:
            self.blocks.add(add)
            return None, f"nested: the branch holds residual blocks (first add '{inner}')"
        return best, ""

    def _hidden(self, node: fx.Node) -> str:
        """Return why a leaf module may hide residual adds; "" where it cannot."""
        called = self.flow.modules[str(node.target)]
        name = type(called).__name__
        if isinstance(called, _OPAQUE):
            return (
                f"nn.{name} is kept whole, as torch computes all of it in one call: its residual "
                "adds are not visible (write it as norms, attention and a feed-forward of yours)"
            )
        if has_hooks(called) and any(True for _ in called.children()):
            return f"{name} is kept whole for its forward hooks: residual adds inside it are hidden"
        home = type(called).__module__
        if home.startswith(("torch.nn.", "dropsurgery.")) or isinstance(called, _NormBase):
            return ""
        if any(True for _ in called.children()) and any(True for _ in called.parameters()):
            reason = f"{name} is kept whole: residual adds inside it, if any, are not visible"
            inside = is_timm_whole(called) and traced_shape(node) is None
            return f"{reason} (trace with example_inputs to look inside)" if inside else reason
        return ""

    def _number(self, sites: list[tuple[fx.Node, Fork, bool]]) -> tuple[Site, ...]:
        """Give each site the depth index of its block.

        A block is one call of the nearest numbered module around the add ("stages.0.2" for adds in
        stages.0.2.attn and stages.0.2.mlp), or of the module whose forward holds it where none is
        numbered. Adds written in the root's own forward are blocks of their own.
        """
        blocks: dict[object, int] = {}
        numbered = []
        batch = batch_axes_of(self.graph, self.flow.modules) if sites else {}
        for add, fork, nested in sites:
            path, call = owner_call(add)
            block = blocks.setdefault(_block_call(add)[1] if path else add, len(blocks) + 1)
            kind: Literal["identity", "projection"] = "identity" if fork.identity else "projection"
            numbered.append(
                Site(
                    block=block,
                    module=path,
                    add=add.name,
                    branch=fork.branch.name,
                    skip=fork.skip.name,
                    kind="nested" if nested else kind,
                    fork=fork.node.name,
                    native=self._native(fork.branch),
                    call=call,
                    linear=fork.linear,
                    batch_axis=_batch_axis(batch[fork.branch], batch[add]),
                )
            )
        return tuple(numbered)

    def _positions(
        self, sites: list[tuple[fx.Node, Fork, bool]], numbered: tuple[Site, ...]
    ) -> tuple[dict[int, int], int]:
        """Return each residual block's place among all blocks, in the order they run, and how many.

        The blocks of a network stand in rows: paths that differ in numbers alone, such as
        features.1.0 and features.2.3. Every module that stands in a row with a residual block, and
        is neither a layer of torch's nor a mere sequence, counts.
        """
        rows = {_row(_block_call(add)[0]) for add, _, _ in sites}
        calls: dict[str, int] = {}
        for node in self.flow.nodes:
            for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
                if path and _row(path) in rows and not _is_no_block(kind):
                    calls.setdefault(key, len(calls) + 1)
        pairs = zip(sites, numbered, strict=True)
        keys = {site.block: _block_call(add)[1] for (add, _, _), site in pairs}
        if not all(key in calls for key in keys.values()):
            return {block: block for block in keys}, len(keys)
        return {block: calls[key] for block, key in keys.items()}, len(calls)

    def _native(self, branch: fx.Node) -> str | None:
        """Return the drop-path call at the end of a branch, behind gains and views at most."""
        for node in self.flow.tail(branch):
            called = called_module(self.module, node)
            if called is not None and is_drop_path(called):
                return node.name
        return None


def _batch_axis(branch: BatchAxis, total: BatchAxis) -> int | None:
    """Return the batch axis of a branch; where it has none of its own, that of the sum tells."""
    found = total if branch.kind == "unknown" and total.kind == "mixed" else branch
    return {"axis": found.axis, "mixed": None}.get(found.kind, 0)


def _is_no_block(kind: object) -> bool:
    """Say whether a class is a layer of torch's, or a mere sequence such as conv, norm and act."""
    home = getattr(kind, "__module__", "")
    return home.startswith("torch.nn.") or (
        isinstance(kind, type) and issubclass(kind, nn.Sequential)
    )


def _block_call(add: fx.Node) -> tuple[str, str]:
    """Return path and call key of the block that an add belongs to."""
    owner, call = owner_call(add)
    names = owner.split(".")
    while names and not re.fullmatch(r"(.*[_-])?\d+", names[-1]):
        names.pop()
    path = ".".join(names)
    stack = add.meta.get("nn_module_stack") or {}
    keys = [key for key, (place, _) in stack.items() if place == path]
    return (path, keys[-1]) if path and keys else (owner, call)


def _row(path: str) -> str:
    """Return a module path with its numbers taken out."""
    return re.sub(r"\d+", "*", path)
