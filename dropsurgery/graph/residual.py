"""Residual sites: which adds join a branch to a skip, and why each other add does not.

An add of two data tensors u + v is a residual site when there is a node f, the *fork*, such that

- one operand, the skip, comes from f through nothing but views, slices, pooling, normalisation and
  affine projections (convolution, linear, BatchNorm), and
- the other, the branch, is computed from f (and whatever else: masks, memory, position tables)
  through at least one operation that is not affine.

Where both operands are affine in f the add is a linear multi-branch (RepVGG, convolutional position
encoding). Where the branch itself holds residual sites, it is a long skip around blocks. The skip
of an add that is already a site is followed through it, so that x + attention(x) + mlp(x) is two
sites on one stream. Only data counts as an edge: parameters, constants and sizes do not.

For each add the nodes behind the skip operand are visited nearest first, and the ancestors of the
other operand are expanded just as far back as the node that is asked about. A site is therefore
found in time proportional to its branch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from dropsurgery.graph.leaves import DROP_PATHS, is_one_of
from dropsurgery.graph.module import Skip, called_module, graphs, module_path, owner_call
from dropsurgery.graph.ops import Kind, Role, kind_of, roles
from dropsurgery.graph.trace import trace
from dropsurgery.tables import render


@dataclass(frozen=True)
class Site:
    """One residual add.

    Attributes:
        block: depth index l of its block, from 1; the adds of one block share it.
        module: dotted path of the module whose forward holds the add ("" is the root).
        add: name of the add's fx node.
        branch: name of the node that the add reads on the branch side.
        skip: name of the node that the add reads on the skip side.
        kind: "identity" where the skip is the fork itself or a view of it, else "projection".
        fork: name of the node that branch and skip both come from.
        native: name of the drop-path call that the network already has on this branch, or None.
        call: which call of `module` it is: equals `module` but for modules that are called again.
    """

    block: int
    module: str
    add: str
    branch: str
    skip: str
    kind: Literal["identity", "projection"]
    fork: str
    native: str | None = None
    call: str = ""


@dataclass(frozen=True)
class Residuals:
    """What `find_residuals` returns; `str()` draws it as two tables.

    Attributes:
        sites: the residual adds, in the order in which they run.
        skipped: every other add of tensors, and why it is none.
    """

    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]

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


def find_residuals(model: nn.Module) -> Residuals:
    """Find the residual adds of a network, and say of every other add of tensors why it is none.

    The analysis reads dataflow, not names. Nothing is run and `model` is not changed.

    Args:
        model: any `nn.Module`, or a GraphModule that dropsurgery returned.

    Returns:
        The sites and the skipped adds. Of a network with two graphs (one for training) the eval
        graph is reported; node names are those of `ds.trace(model).graph`.

    Raises:
        TraceError: the network cannot be turned into a graph.
    """
    module = model if isinstance(model, fx.GraphModule) else trace(model)
    return analyse(module, graphs(module)[0])


def analyse(module: fx.GraphModule, graph: fx.Graph) -> Residuals:
    """Find the residual adds of one graph of a traced module."""
    return _Analysis(module, graph).run()


@dataclass
class _Found:
    """A candidate: one operand of an add as skip, the other as branch."""

    fork: fx.Node
    skip: fx.Node
    branch: fx.Node
    identity: bool
    region: list[fx.Node]
    linear: bool


_PASSED_BY_SKIP = frozenset(
    {Kind.ALIAS, Kind.DROP, Kind.SLICE, Kind.ITEM, Kind.LINEAR, Kind.POOL, Kind.NORM, Kind.SUB,
     Kind.CONCAT}
)  # fmt: skip
_SAME_VALUES = frozenset({Kind.ALIAS, Kind.DROP})
_AFFINE = frozenset(
    {Kind.ALIAS, Kind.DROP, Kind.SLICE, Kind.ITEM, Kind.LINEAR, Kind.ADD, Kind.SUB, Kind.CONCAT,
     Kind.SPLIT}
)  # fmt: skip
_OPAQUE = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
           nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # fmt: skip


class _Analysis:
    """The walk over one graph. Reads; never changes it."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph) -> None:
        self.module = module
        self.nodes = list(graph.nodes)
        self.index = {node: position for position, node in enumerate(self.nodes)}
        self.roles = roles(module, graph)
        self.kinds: dict[fx.Node, Kind] = {}
        self.skip_of_site: dict[fx.Node, fx.Node] = {}
        self.linear_adds: set[fx.Node] = set()

    def run(self) -> Residuals:
        sites: list[tuple[fx.Node, _Found]] = []
        skipped: list[Skip] = []
        for node in self.nodes:
            if node.op == "call_module":
                reason = self._hidden(node)
            elif self.kind(node) is Kind.ADD and self.roles[node] is not Role.SCALAR:
                found, reason = self._classify(node)
                if found is not None:
                    self.skip_of_site[node] = found.skip
                    sites.append((node, found))
            else:
                continue
            if reason:
                skipped.append(Skip(module_path(node), node.name, reason))
        return Residuals(self._number(sites), tuple(skipped))

    def kind(self, node: fx.Node) -> Kind:
        if node not in self.kinds:
            self.kinds[node] = kind_of(self.module, node)
        return self.kinds[node]

    def data(self, node: fx.Node) -> list[fx.Node]:
        """Return the inputs of a node through which data flows."""
        return [value for value in node.all_input_nodes if self.roles[value] is Role.DATA]

    def _classify(self, add: fx.Node) -> tuple[_Found | None, str]:
        """Return the candidate that makes `add` a site, or the reason why none does."""
        operands = self.data(add)
        if not operands:
            return None, "constant: no operand depends on the network's input"
        if len(operands) == 1:
            if sum(value is operands[0] for value in add.args) > 1:
                return None, "adds a tensor to itself"
            others = [v for v in add.all_input_nodes if self.roles[v] is Role.CONSTANT]
            what = f"the constant '{others[0].name}'" if others else "a number"
            return None, f"adds {what}, not a branch"
        left, right = operands[0], operands[1]
        candidates = [c for c in (self._as_skip(left, right), self._as_skip(right, left)) if c]
        if not candidates:
            return None, "neither operand is a skip: no common fork behind views and projections"
        best = max(candidates, key=lambda c: (not c.linear, self.index[c.fork], c.identity))
        if best.linear:
            self.linear_adds.add(add)
            self.skip_of_site[add] = best.skip
            return None, f"linear branch: '{best.branch.name}' is affine in '{best.fork.name}'"
        inner = [
            n.name for n in best.region if n in self.skip_of_site and n not in self.linear_adds
        ]
        if inner:
            return None, f"nested: the branch holds residual blocks (first add '{inner[0]}')"
        return best, ""

    def _as_skip(self, skip: fx.Node, branch: fx.Node) -> _Found | None:
        """Return the nearest fork that makes `skip` the skip and `branch` the branch."""
        ancestors = _Ancestors(self, branch)
        for node, identity in self._behind(skip):
            if node is not branch and ancestors.holds(node):
                region = self._region(node, branch, ancestors)
                return _Found(node, skip, branch, identity, region, self._affine(region))
        return None

    def _behind(self, skip: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
        """Yield the nodes behind a skip operand, latest first, and whether only views lie between.

        The walk goes on through what a skip may do, and through other sites along their skip.
        """
        heap = [(-self.index[skip], True)]
        seen = {skip}
        while heap:
            position, identity = heapq.heappop(heap)
            node = self.nodes[-position]
            yield node, identity
            kind = self.kind(node)
            before: list[fx.Node] = []
            if node in self.linear_adds:
                before = self.data(node)
            elif node in self.skip_of_site:
                before = [self.skip_of_site[node]]
            elif kind in _PASSED_BY_SKIP and len(self.data(node)) == 1:
                before = self.data(node)
                if kind is Kind.ITEM and self.kind(before[0]) is not Kind.ITEM:
                    before = [] if self._is_tuple(before[0]) else before
            elif kind in (Kind.ADD, Kind.PRODUCT) and len(self.data(node)) == 1:
                scaled = kind is Kind.PRODUCT and not self._elementwise(node)
                before = [] if scaled else self.data(node)
            identity = identity and (kind in _SAME_VALUES or node in self.skip_of_site)
            for value in before:
                if value not in seen:
                    seen.add(value)
                    heapq.heappush(heap, (-self.index[value], identity))

    def _is_tuple(self, node: fx.Node) -> bool:
        return self.kind(node) is Kind.SPLIT or (
            # Every reader takes an entry by number: a tuple, such as an LSTM's or attention's.
            self.kind(node) is Kind.NONLINEAR
            and all(self.kind(u) is Kind.ITEM and isinstance(u.args[1], int) for u in node.users)
        )

    def _elementwise(self, node: fx.Node) -> bool:
        name = getattr(node.target, "__name__", str(node.target)).strip("_")
        return name in ("mul", "imul", "div", "truediv", "itruediv")

    def _region(self, fork: fx.Node, branch: fx.Node, ancestors: _Ancestors) -> list[fx.Node]:
        """Return the nodes on the paths from `fork` (left out) to `branch`, in order."""
        ancestors.holds(fork)
        start = self.index[fork]
        members = sorted(
            (n for n in ancestors.seen if self.index[n] > start), key=self.index.__getitem__
        )
        reached = {fork}
        region = []
        for node in members:
            if any(value in reached for value in self.data(node)):
                reached.add(node)
                region.append(node)
        return region

    def _affine(self, region: list[fx.Node]) -> bool:
        """Say whether everything on the region's paths is affine in the fork."""
        return all(
            self.kind(node) in _AFFINE
            or (self.kind(node) is Kind.PRODUCT and len(self.data(node)) == 1)
            for node in region
        )

    def _hidden(self, node: fx.Node) -> str:
        """Return why a leaf module may hide residual adds; "" where it cannot."""
        called = self.module.get_submodule(str(node.target))
        name = type(called).__name__
        if isinstance(called, _OPAQUE):
            return f"nn.{name} is kept whole: its residual adds are not visible"
        home = type(called).__module__
        if home.startswith(("torch.nn.", "dropsurgery.")) or isinstance(called, _NormBase):
            return ""
        if any(True for _ in called.children()) and any(True for _ in called.parameters()):
            return f"{name} is kept whole: residual adds inside it, if any, are not visible"
        return ""

    def _number(self, sites: list[tuple[fx.Node, _Found]]) -> tuple[Site, ...]:
        """Give each site the depth index of its block.

        A block is one call of the module whose forward holds the add. Adds written in the root's
        own forward are blocks of their own: there is no smaller module to group them by.
        """
        blocks: dict[object, int] = {}
        numbered = []
        for add, found in sites:
            path, call = owner_call(add)
            block = blocks.setdefault(call if path else add, len(blocks) + 1)
            numbered.append(
                Site(
                    block=block,
                    module=path,
                    add=add.name,
                    branch=found.branch.name,
                    skip=found.skip.name,
                    kind="identity" if found.identity else "projection",
                    fork=found.fork.name,
                    native=self._native(found.branch),
                    call=call,
                )
            )
        return tuple(numbered)

    def _native(self, branch: fx.Node) -> str | None:
        """Return the drop-path call at the end of a branch, behind gains and views at most."""
        node = branch
        while True:
            called = called_module(self.module, node)
            if called is not None and is_one_of(called, DROP_PATHS):
                return node.name
            before = self.data(node)
            passes = self.kind(node) in (Kind.ALIAS, Kind.DROP, Kind.PRODUCT, Kind.SLICE, Kind.ITEM)
            if not passes or len(before) != 1:
                return None
            node = before[0]


class _Ancestors:
    """The ancestors of a node, expanded backwards only as far as is asked."""

    def __init__(self, analysis: _Analysis, node: fx.Node) -> None:
        self.analysis = analysis
        self.seen = {node}
        self.heap = [-analysis.index[node]]

    def holds(self, node: fx.Node) -> bool:
        """Say whether `node` is the start or an ancestor of it."""
        position = self.analysis.index[node]
        while self.heap and -self.heap[0] > position:
            for value in self.analysis.data(self.analysis.nodes[-heapq.heappop(self.heap)]):
                if value not in self.seen:
                    self.seen.add(value)
                    heapq.heappush(self.heap, -self.analysis.index[value])
        return node in self.seen
